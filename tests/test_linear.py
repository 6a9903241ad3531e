"""Narrow and int8 weights on the CPU: the same answers as the plain way, or almost, and what such models cannot do."""

import copy
import os
import shutil
import subprocess
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Loaded, messages_of
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from deepseek_vl.data.checks import load_data
from deepseek_vl.imaging.open import load_image
from deepseek_vl.kernels.attention import FLOAT32_ATTENTION, attend_in_float32, use_float32_attention
from deepseek_vl.kernels.device import check_quantization
from deepseek_vl.kernels.int8 import Int8Linear, quantize_int8
from deepseek_vl.kernels.linear import OneDNNLinear, WideningLinear, fastest_linear, replace_linear
from deepseek_vl.kernels.policy import AMD, INTEL, is_made_by, multiplies_fast
from deepseek_vl.models import MultiModalityCausalLM
from deepseek_vl.serve.inference import load_model
from deepseek_vl.train.evaluate import evaluate
from deepseek_vl.utils.io import load_pretrained_model

NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def tiny_in(dtype: torch.dtype) -> MultiModalityCausalLM:
    """The bundled model with plain layers."""
    return MultiModalityCausalLM.from_pretrained("tiny", dtype=dtype).eval()


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error of the whole."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(scope="module")
def prompt() -> dict[str, torch.Tensor]:
    """A prompt with a picture, for the bundled model."""
    _, _, processor = load_model("tiny", device="cpu")
    image = load_image(ROOT / "images" / "shapes.png")
    messages = messages_of("<image_placeholder>Describe the image.", image)
    return dict(processor(conversations=messages, images=[image], force_batchify=True).to("cpu"))


@pytest.fixture(scope="module")
def expected(prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    """The plain model's logits in float32: [1, T, vocabulary]."""
    return logits(tiny_in(torch.float32), prompt)


@torch.inference_mode()
def logits(model: MultiModalityCausalLM, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**prompt).logits.float()


# --- narrow weights ---


@NARROW
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 40)], ids=str)
@torch.inference_mode()
def test_a_widening_layer_is_as_exact_as_a_plain_one(dtype: torch.dtype, bias: bool, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(1024, 5000, bias=bias).to(dtype)  # widened in two parts
    holder = nn.Sequential(copy.deepcopy(plain))
    replace_linear(holder, WideningLinear)
    inputs = torch.randn(*shape, 1024).to(dtype)
    exact = F.linear(inputs.double(), plain.weight.double(), plain.bias.double() if bias else None)
    output = holder(inputs)
    assert (output.dtype, output.shape) == (dtype, exact.shape)
    assert error(output, exact) <= 1.01 * error(plain(inputs), exact)
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(output.double(), exact, rtol=1.01 * rounding, atol=1e-5)


@NARROW
def test_a_widening_model_is_nearer_to_float32_than_a_plain_one(
    dtype: torch.dtype, prompt: dict[str, torch.Tensor], expected: torch.Tensor
) -> None:
    model = tiny_in(dtype)
    plain = error(logits(model, prompt), expected)
    replace_linear(model, WideningLinear)
    use_float32_attention(model.language_model)
    assert error(logits(model, prompt), expected) <= 1.5 * plain  # how roundings add up in one model is luck


@NARROW
def test_its_answers_are_the_plain_ones(dtype: torch.dtype, prompt: dict[str, torch.Tensor]) -> None:
    model = tiny_in(dtype)
    plain = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    replace_linear(model, WideningLinear)
    use_float32_attention(model.language_model)
    assert model.generate(**prompt, max_new_tokens=40, do_sample=False).tolist() == plain.tolist()


def test_in_float32_nothing_changes_at_all(prompt: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    model = tiny_in(torch.float32)
    replace_linear(model, WideningLinear)
    use_float32_attention(model.language_model)
    assert torch.equal(logits(model, prompt), expected)


def test_a_widening_model_is_saved_as_it_was(tmp_path: Path) -> None:
    model = tiny_in(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    replace_linear(model, WideningLinear)
    use_float32_attention(model.language_model)
    model.save_pretrained(tmp_path)
    again = MultiModalityCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())
    assert again.language_model.config._attn_implementation == "sdpa"
    assert type(again.language_model.lm_head) is nn.Linear


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
@pytest.mark.parametrize(("kind", "dtype"), [(WideningLinear, torch.bfloat16), (OneDNNLinear, torch.float32)])
def test_a_model_of_such_layers_learns_as_a_plain_one(
    kind: type[nn.Linear], dtype: torch.dtype, lora: bool, prompt: dict[str, torch.Tensor]
) -> None:
    gradients = []
    for replaced in (False, True):
        model = tiny_in(dtype)
        if replaced:
            replace_linear(model, kind)
            use_float32_attention(model.language_model)
        if lora:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "fc1"], init_lora_weights=False))
        model(**prompt, labels=prompt["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, changed = gradients
    assert plain.keys() == changed.keys()
    assert all(torch.equal(plain[name], changed[name]) for name in plain)


# --- oneDNN's products of float32 ---


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 40)], ids=str)
@torch.inference_mode()
def test_a_layer_of_onednns_products_is_as_exact_as_a_plain_one(bias: bool, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(1024, 500, bias=bias)
    holder = nn.Sequential(copy.deepcopy(plain))
    replace_linear(holder, OneDNNLinear)
    inputs = torch.randn(*shape, 1024)
    exact = F.linear(inputs.double(), plain.weight.double(), plain.bias.double() if bias else None)
    output = holder(inputs)
    assert (output.dtype, output.shape) == (torch.float32, exact.shape)
    assert error(output, exact) <= max(2 * error(plain(inputs), exact), 1e-6)


def test_a_model_of_onednns_products_answers_as_a_plain_one(
    prompt: dict[str, torch.Tensor], expected: torch.Tensor
) -> None:
    model = tiny_in(torch.float32)
    plain = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    replace_linear(model, OneDNNLinear)
    torch.testing.assert_close(logits(model, prompt), expected, rtol=1e-4, atol=1e-4)
    assert model.generate(**prompt, max_new_tokens=40, do_sample=False).tolist() == plain.tolist()


@pytest.mark.parametrize(
    ("maker", "avx512", "kind"),
    [("AMD", True, OneDNNLinear), ("AMD", False, nn.Linear), ("Intel", True, nn.Linear)],
)
def test_loading_takes_the_layers_that_are_the_fastest_on_the_processor(
    maker: str, avx512: bool, kind: type[nn.Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek_vl.kernels.linear.is_made_by", lambda vendor: maker in vendor)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    assert fastest_linear(torch.float32) is kind
    _, _, model = load_pretrained_model("tiny", device="cpu", dtype=torch.float32)
    assert type(model.language_model.lm_head) is kind


@NARROW
def test_threads_widen_weights_at_the_same_time(dtype: torch.dtype) -> None:
    """Each in memory of its own, which serves in inference mode as well as without gradients."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(64 * size, 3000, bias=False) for size in range(1, 5)).to(dtype)
    replace_linear(layers, WideningLinear)
    inputs = [torch.randn(40, layer.in_features).to(dtype) for layer in layers]

    def multiplied(_: int = 0) -> list[torch.Tensor]:
        with torch.inference_mode():
            first = layers[0](inputs[0])
        with torch.no_grad():
            return [first] + [layer(rows) for layer, rows in zip(layers[1:], inputs[1:], strict=True)]

    expected = multiplied()
    with ThreadPoolExecutor(4) as pool:
        for outputs in pool.map(multiplied, range(40)):
            assert all(torch.equal(output, alone) for output, alone in zip(outputs, expected, strict=True))


@pytest.mark.parametrize(
    ("maker", "instructions", "fast"),
    [
        ("AMD", {"avx512_bf16"}, {torch.float32, torch.bfloat16}),
        ("AMD", set(), {torch.float32}),
        ("Intel", {"avx512_bf16"}, {torch.float32}),
        ("Intel", {"avx512_bf16", "amx_tile"}, {torch.float32, torch.bfloat16}),
        ("Intel", {"avx512_bf16", "amx_tile", "amx_fp16"}, {torch.float32, torch.bfloat16, torch.float16}),
    ],
)
def test_weights_stay_narrow_where_the_processor_multiplies_them_fast(
    maker: str, instructions: set[str], fast: set[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("deepseek_vl.kernels.linear.is_made_by", lambda vendor: maker in vendor)
    for name in ("avx512_bf16", "amx_tile", "amx_fp16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in instructions, raising=False)
    multiplies_fast.cache_clear()
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert multiplies_fast(dtype) is (dtype in fast)
            assert (fastest_linear(dtype) is WideningLinear) is (dtype not in fast)
    finally:
        multiplies_fast.cache_clear()


# --- attention ---


@NARROW
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("many", [False, True])
@torch.inference_mode()
def test_attention_is_narrow_where_that_is_faster(
    dtype: torch.dtype, few: bool, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek_vl.kernels.attention.FEW_ARE_FASTER_NARROW", few)
    monkeypatch.setattr("deepseek_vl.kernels.attention.multiplies_fast", lambda dtype: many)
    layer = nn.Module()
    layer.is_causal = True
    key, value = torch.randn(2, 1, 4, 40, 16).to(dtype)
    for queries, is_narrow in ((1, few), (40, many)):
        query = torch.randn(1, 4, queries, 16).to(dtype)
        plain, _ = sdpa_attention_forward(layer, query, key, value, None)
        wide, _ = sdpa_attention_forward(layer, query.float(), key.float(), value.float(), None)
        output, _ = attend_in_float32(layer, query, key, value, None)
        assert torch.equal(output, plain if is_narrow else wide.to(dtype))
        assert not torch.equal(plain, wide.to(dtype))


@NARROW
@pytest.mark.parametrize("masks", [0, 1, 2], ids=["causal", "a mask for all", "a mask for each"])
@pytest.mark.parametrize("queries", [1, 5, 40])
@torch.inference_mode()
def test_attention_in_float32_is_as_exact_as_the_plain_one(
    dtype: torch.dtype, masks: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer heads of keys than of queries, and so many keys that not all heads are widened at once; on a processor
    that multiplies float32 the fastest."""
    monkeypatch.setattr("deepseek_vl.kernels.attention.multiplies_fast", lambda dtype: False)
    monkeypatch.setattr("deepseek_vl.kernels.attention.FEW_ARE_FASTER_NARROW", False)
    torch.manual_seed(0)
    layer = nn.Module()
    layer.num_key_value_groups, layer.is_causal = 2, True
    length = 9000 if queries == 1 else queries
    query = torch.randn(2, 8, queries, 128).to(dtype)
    key, value = torch.randn(2, 2, 4, length, 128).to(dtype)
    mask = torch.rand(masks, 1, queries, length) < 0.5 if masks else None
    if masks:
        mask[..., 0] = True
    exact, _ = sdpa_attention_forward(layer, query.float(), key.float(), value.float(), mask)
    plain, _ = sdpa_attention_forward(layer, query, key, value, mask)
    output, _ = attend_in_float32(layer, query, key, value, mask)
    assert (output.dtype, output.shape) == (dtype, exact.shape)
    assert error(output, exact) <= 1.01 * error(plain, exact)


def test_loading_widens_attention_unless_another_kind_is_asked_for() -> None:
    _, _, model = load_pretrained_model("tiny", device="cpu")
    assert model.language_model.config._attn_implementation == FLOAT32_ATTENTION
    _, _, model = load_pretrained_model("tiny", device="cpu", attn_implementation="eager")
    assert model.language_model.config._attn_implementation == "eager"


# --- int8 ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_an_int8_layer_is_near_the_exact_one(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(512, 300, bias=bias).to(dtype)
    inputs = torch.randn(2, 5, 512).to(dtype)
    output = Int8Linear(linear)(inputs)
    assert output.dtype == dtype
    assert error(output, linear.double()(inputs.double())) < 0.025


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_are_quantised_in_parts_with_the_same_result(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(4096, 24))
    rows = torch.randn(3, 1000, 4096, dtype=dtype, requires_grad=True)
    output = layer(rows)
    assert (output.shape, output.dtype, output.requires_grad) == ((3, 1000, 24), dtype, False)
    assert torch.equal(output, torch.stack([layer(part) for part in rows]))


@pytest.mark.skipif(shutil.which("lscpu") is None, reason="nothing else says who made the processor")
def test_who_made_the_processor_is_known() -> None:
    said = subprocess.run(["lscpu"], capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"})
    makers = {maker for maker in (AMD, INTEL) if maker in said.stdout}
    assert {maker for maker in (AMD, INTEL) if is_made_by(maker)} == makers


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_alone_has_the_result_that_it_has_among_others(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(512, 64))
    rows = torch.randn(4, 512).to(dtype)
    before = rows.clone()
    alone = torch.cat([layer(row[None]) for row in rows])
    assert alone.dtype == dtype
    assert torch.equal(rows, before)
    torch.testing.assert_close(alone, layer(rows), rtol=torch.finfo(dtype).eps, atol=1e-6)


@torch.inference_mode()
def test_an_outlier_in_one_row_does_not_spoil_the_others() -> None:
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(64, 32))
    rows = torch.randn(4, 64)
    with_outlier = rows.clone()
    with_outlier[1, 3] = 1e6
    assert torch.equal(layer(with_outlier)[[0, 2, 3]], layer(rows)[[0, 2, 3]])


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 3])
def test_the_largest_inputs_and_weights_do_not_overflow(rows: int) -> None:
    linear = nn.Linear(256, 8, bias=False)
    linear.weight.fill_(1.0)
    for sign in (1.0, -1.0):
        output = Int8Linear(linear)(torch.full((rows, 256), sign))
        torch.testing.assert_close(output, torch.full((rows, 8), sign * 256))


@torch.inference_mode()
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_what_is_no_number_does_not_become_one(rows: int, value: float) -> None:
    inputs = torch.randn(rows, 16)
    inputs[0, 3] = value
    assert not Int8Linear(nn.Linear(16, 8))(inputs)[0].isfinite().any()


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 2])
def test_rows_of_zeros_or_of_almost_nothing_and_weights_of_zeros_give_the_bias(rows: int) -> None:
    linear = nn.Linear(16, 8)
    assert torch.equal(Int8Linear(linear)(torch.zeros(rows, 16)), linear.bias.expand(rows, 8))
    assert torch.equal(Int8Linear(linear)(torch.full((rows, 16), 1e-45)), linear.bias.expand(rows, 8))
    linear.weight.zero_()
    assert torch.equal(Int8Linear(linear)(torch.randn(rows, 16)), linear.bias.expand(rows, 8))


class Siblings(nn.Module):
    """Layers that get the same input, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(64, 64), nn.Linear(64, 32, bias=False), nn.Linear(64, 32)

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        return [layer(input) for layer, input in zip(layers, inputs, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_siblings_give_what_each_would_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = Siblings().to(dtype)
    siblings = copy.deepcopy(plain)
    quantize_int8(siblings)
    alone = [Int8Linear(layer) for layer in plain.children()]
    first, second = torch.randn(2, 3, 64).to(dtype)
    for inputs in ((first,) * 3, (second,) * 3, (first, second, first), (second, first, first), (first.clone(),) * 3):
        expected = [layer(input) for layer, input in zip(alone, inputs, strict=True)]
        for output, wanted in zip(siblings(*inputs), expected, strict=True):
            assert torch.equal(output, wanted)


@torch.no_grad()
def test_siblings_keep_no_input_and_no_output() -> None:
    siblings = Siblings()
    quantize_int8(siblings)
    inputs = torch.randn(3, 64)
    kept = [weakref.ref(inputs), *(weakref.ref(output._base) for output in siblings(inputs, inputs, inputs))]
    del inputs
    assert all(reference() is None for reference in kept)


@pytest.fixture(scope="module")
def quantised() -> Loaded:
    tokenizer, processor, model = load_pretrained_model("tiny", device="cpu", quantize="int8")
    return tokenizer, model, processor


def test_every_linear_layer_is_quantised(quantised: Loaded) -> None:
    _, model, _ = quantised
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    for part in (model.vision_model, model.aligner, model.language_model):
        assert any(isinstance(module, Int8Linear) for module in part.modules())


def test_its_logits_are_near_the_exact_ones(
    quantised: Loaded, prompt: dict[str, torch.Tensor], expected: torch.Tensor
) -> None:
    actual = logits(quantised[1], prompt)
    assert error(actual, expected) < 0.1
    agreement = (actual.argmax(-1) == expected.argmax(-1)).float().mean().item()
    assert agreement >= 0.9


def test_it_answers_as_well_about_pictures(quantised: Loaded) -> None:
    rows, _ = load_data(ROOT / "tests" / "pictures" / "questions.jsonl", quantised[2])
    tables = [
        evaluate(model, processor, rows, max_new_tokens=64, limit=60)
        for _, model, processor in (load_model("tiny", device="cpu"), quantised)
    ]
    plain, int8 = (table.total.right for table in tables)
    assert int8 >= plain - 2, f"{int8} instead of {plain} right answers"


def test_float_weights_are_let_go_as_int8_ones_come() -> None:
    model = tiny_in(torch.float32)
    weights = [weakref.ref(module.weight) for module in model.modules() if isinstance(module, nn.Linear)]
    quantize_int8(model)
    assert all(weight() is None for weight in weights)


def test_it_cannot_learn(quantised: Loaded) -> None:
    with pytest.raises(ValueError, match="cannot learn"):
        quantised[1].train()


def test_it_cannot_be_saved(quantised: Loaded, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be saved"):
        quantised[1].save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="cannot be saved"):
        quantised[1].state_dict()


@pytest.mark.parametrize(
    ("device", "quantize", "message"),
    [
        ("mps", "int8", "for cpu and cuda, not for mps"),
        ("cpu", "int4", "for cuda, not for cpu"),
        ("cpu", "int3", "Unknown quantize 'int3'; try int8 or int4"),
    ],
)
def test_what_cannot_be_quantised_is_said_before_anything_is_loaded(device: str, quantize: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_quantization(torch.device(device), quantize)


def test_an_unknown_kind_is_an_error_of_loading(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown quantize 'int5'"):
        load_pretrained_model(tmp_path, device="cpu", quantize="int5")


def test_widening_layers_are_linear_layers_to_others() -> None:
    model = tiny_in(torch.float16)
    replace_linear(model, WideningLinear)
    assert isinstance(model.language_model.lm_head, WideningLinear)
    assert isinstance(model.language_model.lm_head, nn.Linear)

"""Narrow and int8 weights on the CPU: the same answers as the plain way, or almost, and what such models cannot do."""

import copy
import os
import shutil
import subprocess
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Loaded, messages_of
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deepseek_vl.data.checks import load_data
from deepseek_vl.imaging.open import load_image
from deepseek_vl.kernels.attention import ATTENTION, attend
from deepseek_vl.kernels.device import check_quantization, pick_dtype
from deepseek_vl.kernels.int8 import LEVELS, Int8Linear, quantize_int8
from deepseek_vl.kernels.linear import OneDNNLinear, WideningLinear, replace_linear
from deepseek_vl.kernels.policy import features, kernel_for, multiplies_fast, set_kernels, widened_rows
from deepseek_vl.models import MultiModalityCausalLM
from deepseek_vl.serve.inference import load_model
from deepseek_vl.train.evaluate import evaluate
from deepseek_vl.utils.io import load_pretrained_model

NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def tiny_in(dtype: torch.dtype) -> MultiModalityCausalLM:
    """The bundled model with plain layers."""
    return MultiModalityCausalLM.from_pretrained("tiny", dtype=dtype).eval()


def widen(model: MultiModalityCausalLM) -> None:
    """Have a model multiply and attend in float32, whatever the processor."""
    replace_linear(model, WideningLinear)
    model.language_model.set_attn_implementation(ATTENTION["widening", "widening"])


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
    widen(model)
    assert error(logits(model, prompt), expected) <= 1.5 * plain  # how roundings add up in one model is luck


@NARROW
def test_its_answers_are_the_plain_ones(dtype: torch.dtype, prompt: dict[str, torch.Tensor]) -> None:
    model = tiny_in(dtype)
    plain = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    widen(model)
    assert model.generate(**prompt, max_new_tokens=40, do_sample=False).tolist() == plain.tolist()


def test_in_float32_nothing_changes_at_all(prompt: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    model = tiny_in(torch.float32)
    widen(model)
    assert torch.equal(logits(model, prompt), expected)


def test_a_widening_model_is_saved_as_it_was(tmp_path: Path) -> None:
    model = tiny_in(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    widen(model)
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
            model.language_model.set_attn_implementation(ATTENTION["widening", "widening"])
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


# --- which of them ---

Fake = Callable[[str], None]
KINDS = {
    # kind: machine, vendor, what PyTorch says of it; float32, bfloat16 and float16 products, few queries, int8's inputs
    "Xeon, AVX2": ("x86_64", "GenuineIntel", "avx2", "plain widening widening plain fbgemm-7-bit"),
    "Xeon, AVX2 and VNNI": ("x86_64", "GenuineIntel", "avx2 vnni", "plain widening widening plain onednn"),
    "Xeon, AVX-512": ("AMD64", "GenuineIntel", "avx2 avx512 vnni bf16", "plain widening widening plain onednn"),
    "Xeon, AVX-512 bf16": (
        *("x86_64", "GenuineIntel", "avx2 avx512 vnni avx512_bf16 bf16 fp16"),
        "plain widening widening plain onednn",
    ),
    "Xeon, AMX": (
        *("x86_64", "GenuineIntel", "avx2 avx512 vnni avx512_bf16 amx_tile bf16 fp16"),
        "plain plain widening plain onednn",
    ),
    "Xeon, AMX fp16": (
        *("x86_64", "GenuineIntel", "avx2 avx512 vnni avx512_bf16 amx_tile amx_fp16 bf16 fp16"),
        "plain plain plain plain onednn",
    ),
    "EPYC, AVX2": ("x86_64", "AuthenticAMD", "avx2", "plain widening widening widening fbgemm-7-bit"),
    "EPYC, AVX-512 bf16": (
        *("x86_64", "AuthenticAMD", "avx2 avx512 vnni avx512_bf16 bf16"),
        "onednn plain widening widening onednn",
    ),
    "of another maker": ("x86_64", "", "avx2 avx512 vnni avx512_bf16 bf16", "plain widening widening widening onednn"),
    "Arm": ("aarch64", "", "", "plain widening widening widening onednn"),
    "Arm, fp16": ("arm64", "", "fp16", "plain widening plain widening onednn"),
    "Arm, bf16 and fp16": ("aarch64", "", "bf16 fp16", "plain plain plain widening onednn"),
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """Makes this processor one of the `KINDS`, for as long as the test runs."""

    def become(kind: str, has_onednn: bool = True) -> None:
        machine, vendor, told, _ = KINDS[kind]
        monkeypatch.setattr("platform.machine", lambda: machine)
        monkeypatch.setattr("deepseek_vl.kernels.policy._vendor", lambda: f"vendor_id : {vendor}")
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
        for name in ("avx2", "avx512", "vnni", "avx512_bf16", "amx_tile", "amx_fp16"):
            monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in told.split())
        for name in ("bf16", "fp16"):
            monkeypatch.setattr(
                torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda name=name: name in told.split()
            )
        features.cache_clear()

    yield become
    features.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_processor_has_its_kernels(kind: str, fake: Fake) -> None:
    fake(kind)
    *products, few, int8 = KINDS[kind][3].split()
    for dtype, product in zip((torch.float32, torch.bfloat16, torch.float16), products, strict=True):
        assert kernel_for("linear", dtype) == product
        assert multiplies_fast(dtype) is (product != "widening")
        is_narrow = dtype is not torch.float32
        assert kernel_for("attention_many", dtype) == (product if is_narrow else "plain")
        assert kernel_for("attention_few", dtype) == (few if is_narrow else "plain")
    assert kernel_for("int8", torch.int8) == int8
    told = KINDS[kind][2].split()
    assert pick_dtype(torch.device("cpu")) is (torch.bfloat16 if "bf16" in told else torch.float32)
    assert widened_rows() == (6 if "avx2" in told and "avx512" not in told else 32)


def test_without_onednn_nothing_of_it_is_used(fake: Fake) -> None:
    fake("EPYC, AVX-512 bf16", has_onednn=False)
    assert kernel_for("linear", torch.float32) == "plain"
    assert kernel_for("linear", torch.bfloat16) == "widening"
    assert pick_dtype(torch.device("cpu")) is torch.float32


@pytest.mark.parametrize(
    ("kind", "dtype", "layers", "attention"),
    [
        ("EPYC, AVX-512 bf16", torch.float32, OneDNNLinear, "sdpa_rows"),
        ("EPYC, AVX-512 bf16", torch.bfloat16, nn.Linear, "sdpa_rows_float32_few"),
        ("EPYC, AVX2", torch.bfloat16, WideningLinear, "sdpa_rows_float32"),
        ("Xeon, AVX-512", torch.bfloat16, WideningLinear, "sdpa_rows_float32_many"),
        ("Xeon, AMX", torch.bfloat16, nn.Linear, "sdpa_rows"),
        ("Xeon, AMX", torch.float16, WideningLinear, "sdpa_rows_float32_many"),
    ],
)
def test_loading_takes_what_is_the_fastest_on_the_processor(
    kind: str, dtype: torch.dtype, layers: type[nn.Linear], attention: str, fake: Fake
) -> None:
    fake(kind)
    _, _, model = load_pretrained_model("tiny", device="cpu", dtype=dtype)
    assert type(model.language_model.lm_head) is layers
    assert type(model.vision_model.vision_tower.blocks[0].attn.qkv) is layers
    assert model.language_model.config._attn_implementation == attention


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "sum_of_inputs"), [("EPYC, AVX2", 1.0), ("EPYC, AVX-512 bf16", 1 + 1 / 127)])
def test_without_vnni_inputs_have_seven_bits(kind: str, sum_of_inputs: float, fake: Fake) -> None:
    fake(kind)
    linear = nn.Linear(16, 8, bias=False)
    linear.weight.fill_(1.0)
    inputs = torch.tensor([[1.0, 1 / 127] + [0.0] * 14])  # the second is not half of one of 63 steps
    torch.testing.assert_close(Int8Linear(linear)(inputs), torch.full((1, 8), sum_of_inputs))


def test_attention_that_is_asked_for_stays() -> None:
    _, _, model = load_pretrained_model("tiny", device="cpu", attn_implementation="eager")
    assert model.language_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("by", ["function", "variable", "both"])
def test_other_kernels_can_be_asked_for(by: str, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("Xeon, AMX")
    if by != "function":
        monkeypatch.setenv("DEEPSEEK_VL_KERNELS", "linear=widening, attention_few=widening")
    if by == "both":
        monkeypatch.setenv("DEEPSEEK_VL_KERNELS", "linear=onednn,attention_few=widening")
    try:
        if by != "variable":
            set_kernels(**{"linear": "widening"} | ({"attention_few": "widening"} if by == "function" else {}))
        _, _, model = load_pretrained_model("tiny", device="cpu", dtype="bfloat16")
        assert type(model.language_model.lm_head) is WideningLinear
        assert model.language_model.config._attn_implementation == "sdpa_rows_float32_few"
        assert multiplies_fast(torch.bfloat16), "what is trained in does not depend on it"
    finally:
        set_kernels()
    monkeypatch.delenv("DEEPSEEK_VL_KERNELS", raising=False)
    _, _, model = load_pretrained_model("tiny", device="cpu", dtype="bfloat16")
    assert type(model.language_model.lm_head) is nn.Linear
    assert model.language_model.config._attn_implementation == "sdpa_rows"


@pytest.mark.parametrize("wrong", ["fast", "linear", "linear=fast", "matmul=plain", "attention_few=onednn"])
def test_a_kernel_that_there_is_not_is_an_error(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_VL_KERNELS", wrong)
    with pytest.raises(ValueError, match=r"no kernel .*There are linear: plain, widening, onednn; attention_few"):
        load_pretrained_model("tiny", device="cpu")
    name, _, kernel = wrong.partition("=")
    with pytest.raises(ValueError, match="no kernel"):
        set_kernels(**{name: kernel})
    monkeypatch.delenv("DEEPSEEK_VL_KERNELS")
    load_pretrained_model("tiny", device="cpu")


@pytest.mark.skipif(shutil.which("lscpu") is None, reason="nothing else says who made the processor")
def test_who_made_the_processor_is_known() -> None:
    said = subprocess.run(["lscpu"], capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"})
    makers = {name for name, maker in (("amd", "AuthenticAMD"), ("intel", "GenuineIntel")) if maker in said.stdout}
    assert features() & {"amd", "intel"} == makers


# --- attention ---


@NARROW
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("many", [False, True])
@torch.inference_mode()
def test_attention_is_in_float32_where_that_is_asked_for(dtype: torch.dtype, few: bool, many: bool) -> None:
    layer = nn.Module()
    layer.is_causal = True
    kernels = {False: "plain", True: "widening"}
    attend = ALL_ATTENTION_FUNCTIONS[ATTENTION[kernels[few], kernels[many]]]
    key, value = torch.randn(2, 1, 4, 40, 16).to(dtype)
    for queries, is_wide in ((1, few), (31, few), (32, many), (40, many)):
        query = torch.randn(1, 4, queries, 16).to(dtype)
        plain, _ = sdpa_attention_forward(layer, query, key, value, None)
        wide, _ = sdpa_attention_forward(layer, query.float(), key.float(), value.float(), None)
        output, _ = attend(layer, query, key, value, None)
        assert torch.equal(output, wide.to(dtype) if is_wide else plain)
        assert not torch.equal(plain, wide.to(dtype))


@NARROW
@pytest.mark.parametrize("masks", [0, 1, 2], ids=["causal", "a mask for all", "a mask for each"])
@pytest.mark.parametrize("queries", [1, 5, 40])
@torch.inference_mode()
def test_attention_in_float32_is_as_exact_as_the_plain_one(dtype: torch.dtype, masks: int, queries: int) -> None:
    """With fewer heads of keys than of queries, and so many keys that not all heads are widened at once."""
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
    output, _ = attend(layer, query, key, value, mask)
    assert (output.dtype, output.shape) == (dtype, exact.shape)
    assert error(output, exact) <= 1.01 * error(plain, exact)


# --- int8 ---


@pytest.fixture(params=LEVELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each kernel for int8 weights that PyTorch has on this processor."""
    if request.param.startswith("fbgemm") and not features() >= {"x86", "fbgemm"}:
        pytest.skip("PyTorch has no FBGEMM here.")
    set_kernels(int8=request.param)
    yield request.param
    set_kernels()


@pytest.mark.usefixtures("kernel")
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


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_are_quantised_in_parts_with_the_same_result(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(4096, 24))
    rows = torch.randn(3, 1000, 4096, dtype=dtype, requires_grad=True)
    output = layer(rows)
    assert (output.shape, output.dtype, output.requires_grad) == ((3, 1000, 24), dtype, False)
    assert torch.equal(output, torch.stack([layer(part) for part in rows]))


@pytest.mark.usefixtures("kernel")
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


@pytest.mark.usefixtures("kernel")
@torch.inference_mode()
def test_an_outlier_in_one_row_does_not_spoil_the_others() -> None:
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(64, 32))
    rows = torch.randn(4, 64)
    with_outlier = rows.clone()
    with_outlier[1, 3] = 1e6
    assert torch.equal(layer(with_outlier)[[0, 2, 3]], layer(rows)[[0, 2, 3]])


@pytest.mark.usefixtures("kernel")
@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 3])
def test_the_largest_inputs_and_weights_do_not_overflow(rows: int) -> None:
    linear = nn.Linear(256, 8, bias=False)
    linear.weight.fill_(1.0)
    for sign in (1.0, -1.0):
        output = Int8Linear(linear)(torch.full((rows, 256), sign))
        torch.testing.assert_close(output, torch.full((rows, 8), sign * 256))


@pytest.mark.usefixtures("kernel")
@torch.inference_mode()
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_what_is_no_number_does_not_become_one(rows: int, value: float) -> None:
    inputs = torch.randn(rows, 16)
    inputs[0, 3] = value
    assert not Int8Linear(nn.Linear(16, 8))(inputs)[0].isfinite().any()


@pytest.mark.usefixtures("kernel")
@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 2])
def test_rows_of_zeros_or_of_almost_nothing_and_weights_of_zeros_give_the_bias(rows: int) -> None:
    linear = nn.Linear(16, 8)
    assert torch.equal(Int8Linear(linear)(torch.zeros(rows, 16)), linear.bias.expand(rows, 8))
    assert torch.equal(Int8Linear(linear)(torch.full((rows, 16), 1e-45)), linear.bias.expand(rows, 8))
    linear.weight.zero_()
    assert torch.equal(Int8Linear(linear)(torch.randn(rows, 16)), linear.bias.expand(rows, 8))


@torch.inference_mode()
@pytest.mark.skipif(not features() >= {"x86", "fbgemm"}, reason="PyTorch has no FBGEMM here")
@pytest.mark.parametrize("rows", [1, 40])
def test_kernels_that_quantise_alike_give_the_same(rows: int) -> None:
    torch.manual_seed(0)
    linear, inputs, outputs = nn.Linear(512, 300), torch.randn(rows, 512), []
    for kernel in ("onednn-7-bit", "fbgemm-7-bit"):
        set_kernels(int8=kernel)
        outputs.append(Int8Linear(linear)(inputs))
    set_kernels()
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)


class Siblings(nn.Module):
    """Layers that get the same input, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(64, 64), nn.Linear(64, 32, bias=False), nn.Linear(64, 32)

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        return [layer(input) for layer, input in zip(layers, inputs, strict=True)]


@pytest.mark.usefixtures("kernel")
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

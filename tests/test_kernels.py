"""The CPU's kernels: which one is chosen, and that they agree with PyTorch's own."""

import copy
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import error, logits_of, tiny_in
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deepseek_vl.kernels.attention import ATTENTION, attend
from deepseek_vl.kernels.device import pick_dtype
from deepseek_vl.kernels.int8 import Int8Linear
from deepseek_vl.kernels.layers import OneDNNLinear, WideningConv2d, WideningLinear, replace_layers
from deepseek_vl.kernels.policy import features, kernel_for, multiplies_fast, set_kernels, widened_rows
from deepseek_vl.models import MultiModalityCausalLM
from deepseek_vl.utils.io import load_pretrained_model

NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def widen(model: MultiModalityCausalLM) -> None:
    """Make a model multiply and attend in float32 (`widening`), whatever the processor."""
    replace_layers(model, "widening")
    model.language_model.set_attn_implementation(ATTENTION["widening", "widening"])


# --- narrow weights ---


@NARROW
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 40)], ids=str)
@torch.inference_mode()
def test_a_widening_layer_is_as_exact_as_a_plain_one(dtype: torch.dtype, bias: bool, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(1024, 5000, bias=bias).to(dtype)  # widened in two parts
    holder = nn.Sequential(copy.deepcopy(plain))
    replace_layers(holder, "widening")
    inputs = torch.randn(*shape, 1024).to(dtype)
    exact = F.linear(inputs.double(), plain.weight.double(), plain.bias.double() if bias else None)
    output = holder(inputs)
    assert (output.dtype, output.shape) == (dtype, exact.shape)
    assert error(output, exact) <= 1.01 * error(plain(inputs), exact)
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(output.double(), exact, rtol=1.01 * rounding, atol=1e-5)


@NARROW
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_widening_convolution_is_as_exact_as_a_plain_one(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 10, (3, 5), (2, 1), (1, 2), 1, 2, bias, "reflect").to(dtype)
    holder = nn.Sequential(copy.deepcopy(plain))
    replace_layers(holder, "widening")
    assert type(holder[0]) is WideningConv2d
    image = torch.randn(3, 6, 17, 20).to(dtype)
    exact = copy.deepcopy(plain).double()(image.double())
    output = holder(image)
    assert (output.dtype, output.shape) == (dtype, exact.shape)
    torch.testing.assert_close(output.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


@NARROW
def test_a_widening_model_is_nearer_to_float32_than_a_plain_one(
    dtype: torch.dtype, tiny_prompt: dict[str, torch.Tensor], tiny_logits: torch.Tensor
) -> None:
    model = tiny_in(dtype)
    plain = error(logits_of(model, tiny_prompt), tiny_logits)
    widen(model)
    assert error(logits_of(model, tiny_prompt), tiny_logits) <= 1.5 * plain  # errors add up by chance in one model


@NARROW
def test_its_answers_are_the_plain_ones(dtype: torch.dtype, tiny_prompt: dict[str, torch.Tensor]) -> None:
    model = tiny_in(dtype)
    plain = model.generate(**tiny_prompt, max_new_tokens=40, do_sample=False)
    widen(model)
    assert model.generate(**tiny_prompt, max_new_tokens=40, do_sample=False).tolist() == plain.tolist()


def test_in_float32_nothing_changes_at_all(tiny_prompt: dict[str, torch.Tensor], tiny_logits: torch.Tensor) -> None:
    model = tiny_in(torch.float32)
    widen(model)
    assert torch.equal(logits_of(model, tiny_prompt), tiny_logits)


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
@pytest.mark.parametrize(("kernel", "dtype"), [("widening", torch.bfloat16), ("onednn", torch.float32)])
def test_a_model_of_such_layers_learns_as_a_plain_one(
    kernel: str, dtype: torch.dtype, lora: bool, tiny_prompt: dict[str, torch.Tensor]
) -> None:
    gradients = []
    for replaced in (False, True):
        model = tiny_in(dtype)
        if replaced:
            replace_layers(model, kernel)
            model.language_model.set_attn_implementation(ATTENTION["widening", "widening"])
        if lora:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "fc1"], init_lora_weights=False))
        model(**tiny_prompt, labels=tiny_prompt["input_ids"]).loss.backward()
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
    replace_layers(holder, "onednn")
    inputs = torch.randn(*shape, 1024)
    exact = F.linear(inputs.double(), plain.weight.double(), plain.bias.double() if bias else None)
    output = holder(inputs)
    assert (output.dtype, output.shape) == (torch.float32, exact.shape)
    assert error(output, exact) <= max(2 * error(plain(inputs), exact), 1e-6)


def test_a_model_of_onednns_products_answers_as_a_plain_one(
    tiny_prompt: dict[str, torch.Tensor], tiny_logits: torch.Tensor
) -> None:
    model = tiny_in(torch.float32)
    plain = model.generate(**tiny_prompt, max_new_tokens=40, do_sample=False)
    replace_layers(model, "onednn")
    torch.testing.assert_close(logits_of(model, tiny_prompt), tiny_logits, rtol=1e-4, atol=1e-4)
    assert model.generate(**tiny_prompt, max_new_tokens=40, do_sample=False).tolist() == plain.tolist()


@NARROW
def test_threads_widen_weights_at_the_same_time(dtype: torch.dtype) -> None:
    """Each thread has its own buffer, which works in inference mode and in `no_grad`."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(64 * size, 3000, bias=False) for size in range(1, 5)).to(dtype)
    replace_layers(layers, "widening")
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
    # name: machine, vendor, its features; kernels of float32, bfloat16 and float16 products, of few queries, of int8
    "Xeon, AVX2": ("x86_64", "GenuineIntel", "avx2", "plain widening widening plain fbgemm-7-bit"),
    "Xeon, AVX2 and VNNI": ("x86_64", "GenuineIntel", "avx2 vnni", "plain widening widening plain onednn"),
    "Core, AVX2 and VNNI": ("x86_64", "GenuineIntel", "avx2 avx_vnni", "plain widening widening plain onednn"),
    "Xeon, AVX-512": ("AMD64", "GenuineIntel", "avx2 avx512 vnni bf16", "plain widening widening plain onednn"),
    "Xeon, AVX-512 bf16": (
        *("x86_64", "GenuineIntel", "avx2 avx512 vnni avx512_bf16 bf16 fp16"),
        "plain widening widening plain onednn",
    ),
    "Xeon, AMX": (
        *("x86_64", "GenuineIntel", "avx2 avx512 vnni avx512_bf16 amx_tile bf16 fp16"),
        "plain plain widening plain fbgemm",
    ),
    "Xeon, AMX fp16": (
        *("x86_64", "GenuineIntel", "avx2 avx512 vnni avx512_bf16 amx_tile amx_fp16 bf16 fp16"),
        "plain plain plain plain fbgemm",
    ),
    "EPYC, AVX2": ("x86_64", "AuthenticAMD", "avx2", "plain widening widening widening fbgemm-7-bit"),
    "EPYC, AVX-512 bf16": (
        *("x86_64", "AuthenticAMD", "avx2 avx512 vnni avx512_bf16 bf16"),
        "onednn plain widening widening onednn",
    ),
    "of another maker": ("x86_64", "", "avx2 avx512 vnni avx512_bf16 bf16", "plain widening widening widening onednn"),
    "of another maker, old": ("x86_64", "", "", "plain widening widening widening fbgemm-7-bit"),
    "Arm": ("aarch64", "", "", "plain widening widening widening onednn"),
    "Arm, fp16": ("arm64", "", "fp16", "plain widening plain widening onednn"),
    "Arm, bf16 and fp16": ("aarch64", "", "bf16 fp16", "plain plain plain widening onednn"),
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A function that makes this processor look like one of the `KINDS` during the test."""

    def become(kind: str, has_onednn: bool = True) -> None:
        machine, vendor, told, _ = KINDS[kind]
        monkeypatch.setattr("platform.machine", lambda: machine)
        told_by_linux = {"vendor_id": vendor, "flags": f"fpu {told} sse"}
        monkeypatch.setattr("deepseek_vl.kernels.policy.cpu_info", told_by_linux.__getitem__)
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
    narrow = torch.bfloat16 if "bf16" in told else torch.float16 if "avx2" in told else None
    assert pick_dtype(torch.device("cpu")) is (narrow or torch.float32)
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
    convolution = model.vision_model.vision_tower.patch_embed.proj
    assert isinstance(convolution, WideningConv2d) is (layers is WideningLinear)
    assert model.language_model.config._attn_implementation == attention


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "sum_of_inputs"), [("EPYC, AVX2", 1.0), ("EPYC, AVX-512 bf16", 1 + 1 / 127)])
def test_without_vnni_inputs_have_seven_bits(kind: str, sum_of_inputs: float, fake: Fake) -> None:
    fake(kind)
    linear = nn.Linear(16, 8, bias=False)
    linear.weight.fill_(1.0)
    inputs = torch.tensor([[1.0, 1 / 127] + [0.0] * 14])  # the second is less than half of one of 63 steps
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
    """There are fewer key heads than query heads, and so many keys that heads are widened in several parts."""
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


def test_widening_layers_are_linear_layers_to_others() -> None:
    model = tiny_in(torch.float16)
    replace_layers(model, "widening")
    assert isinstance(model.language_model.lm_head, WideningLinear)
    assert isinstance(model.language_model.lm_head, nn.Linear)

"""int8 and int4 weights on the CPU: almost the same answers as without quantisation, and their limitations."""

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Loaded, error, logits_of, tiny_in
from torch import nn

from deepseek_vl.data.checks import load_data
from deepseek_vl.kernels import int4
from deepseek_vl.kernels.device import check_quantization
from deepseek_vl.kernels.int4 import Int4Linear
from deepseek_vl.kernels.int8 import LEVELS, Int8Linear
from deepseek_vl.kernels.policy import INT4_WIDENED_ROWS, features, set_kernels
from deepseek_vl.kernels.quantized import QuantizedLinear, quantize_layers
from deepseek_vl.serve.inference import load_model
from deepseek_vl.train.evaluate import evaluate
from deepseek_vl.utils.io import load_pretrained_model

KINDS = pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])

# --- int8 ---


@pytest.fixture(params=LEVELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each kernel for int8 weights that PyTorch has on this processor."""
    if request.param.startswith("fbgemm") and not features() >= {"x86", "fbgemm"}:
        pytest.skip("PyTorch has no FBGEMM here.")
    if request.param == "fbgemm" and not features() >= {"avx512", "vnni"}:
        pytest.skip("Sums overflow without VNNI.")
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
@pytest.mark.parametrize("bits", ["-7-bit", ""])
def test_kernels_that_quantise_alike_give_the_same(rows: int, bits: str) -> None:
    if not bits and not features() >= {"avx512", "vnni"}:
        pytest.skip("Sums overflow without VNNI.")
    torch.manual_seed(0)
    linear, inputs, outputs = nn.Linear(512, 300), torch.randn(rows, 512), []
    for library in ("onednn", "fbgemm"):
        set_kernels(int8=library + bits)
        outputs.append(Int8Linear(linear)(inputs))
    set_kernels()
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)


# --- int4 ---


def group_errors(linear: nn.Linear) -> torch.Tensor:
    """The largest error of each weight, [N, K]: half a step of its group, and the rounding of scale and zero point."""
    groups = linear.weight.detach().float().unflatten(1, (-1, int4.GROUP))
    steps = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    rounding = 2**-8 * (8 * steps + groups.abs().amax(-1, keepdim=True))
    return (steps / 2 + rounding).expand_as(groups).flatten(1)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 5, INT4_WIDENED_ROWS, 200])
@pytest.mark.parametrize("outputs", [24, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_an_int4_layer_multiplies_with_the_nearest_of_sixteen_levels(
    dtype: torch.dtype, bias: bool, outputs: int, rows: int
) -> None:
    """A one-hot input gives one column of the weight, whose errors are at most those of the nearest levels."""
    torch.manual_seed(0)
    linear = nn.Linear(256, outputs, bias=bias).to(dtype)
    layer = Int4Linear(linear)
    columns = torch.randint(256, (rows,))
    output = layer(torch.eye(256, dtype=dtype)[columns])
    assert output.dtype == dtype
    exact = linear.weight.double().T[columns]
    shift = linear.bias.double() if bias else 0
    allowed = group_errors(linear).T[columns] + torch.finfo(torch.bfloat16).eps * (exact.abs() + 0.1)
    assert ((output.double() - shift - exact).abs() <= allowed).all()


@torch.inference_mode()
def test_few_and_many_rows_are_multiplied_with_the_same_weights() -> None:
    torch.manual_seed(0)
    layer = Int4Linear(nn.Linear(5504, 1000))  # widened in several parts
    rows = torch.randn(INT4_WIDENED_ROWS, 5504)
    few = torch.cat([layer(part) for part in rows.split(7)])
    assert error(layer(rows), few) < 0.01


@torch.inference_mode()
def test_weights_of_one_value_are_kept_as_they_are() -> None:
    linear = nn.Linear(64, 32)
    for value in (0.0, 0.5, -3.0):
        linear.weight.fill_(value)
        torch.testing.assert_close(Int4Linear(linear)(torch.ones(1, 64)), linear(torch.ones(1, 64)))


@torch.inference_mode()
def test_a_layer_whose_inputs_do_not_divide_into_groups_gets_int8() -> None:
    model = nn.Sequential(nn.Linear(64, 40), nn.Linear(40, 8))
    quantize_layers(model, Int4Linear)
    quantize_layers(model, Int8Linear)
    assert [type(layer) for layer in model] == [Int4Linear, Int8Linear]


def test_a_kernel_that_keeps_weights_in_another_way_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    monkeypatch.setattr(
        torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", lambda levels, tiles: pack(levels.flip(0), tiles)
    )
    int4.block_size.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"no int4 kernel .*; use int8"):
            check_quantization(torch.device("cpu"), "int4")
    finally:
        int4.block_size.cache_clear()


# --- both ---


class Siblings(nn.Module):
    """Three layers, each with its own input, which may be the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(64, 64), nn.Linear(64, 32, bias=False), nn.Linear(64, 32)

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        return [layer(input) for layer, input in zip(layers, inputs, strict=True)]


@KINDS
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_siblings_give_what_each_would_alone(kind: type[QuantizedLinear], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = Siblings().to(dtype)
    siblings = copy.deepcopy(plain)
    quantize_layers(siblings, kind)
    alone = [kind(layer) for layer in plain.children()]
    first, second = torch.randn(2, 3, 64).to(dtype)
    for inputs in ((first,) * 3, (second,) * 3, (first, second, first), (second, first, first), (first.clone(),) * 3):
        expected = [layer(input) for layer, input in zip(alone, inputs, strict=True)]
        for output, wanted in zip(siblings(*inputs), expected, strict=True):
            assert torch.equal(output, wanted)


@KINDS
@torch.no_grad()
def test_siblings_keep_no_input_and_no_output(kind: type[QuantizedLinear]) -> None:
    siblings = Siblings()
    quantize_layers(siblings, kind)
    inputs = torch.randn(3, 64)
    kept = [weakref.ref(inputs), *(weakref.ref(output._base) for output in siblings(inputs, inputs, inputs))]
    del inputs
    assert all(reference() is None for reference in kept)


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantised(request: pytest.FixtureRequest) -> Loaded:
    tokenizer, processor, model = load_pretrained_model("tiny", device="cpu", quantize=request.param)
    return tokenizer, model, processor


def kinds_in(module: nn.Module) -> set[type[nn.Module]]:
    return {type(part) for part in module.modules() if isinstance(part, (nn.Linear, QuantizedLinear))}


@pytest.mark.parametrize(("quantize", "kind"), [("int8", Int8Linear), ("int4", Int4Linear)])
def test_every_linear_layer_is_quantised(quantize: str, kind: type[QuantizedLinear]) -> None:
    _, _, model = load_pretrained_model("tiny", device="cpu", quantize=quantize)
    for part in (model.vision_model, model.aligner, model.language_model.lm_head):
        assert kinds_in(part) == {Int8Linear}
    assert kinds_in(model.language_model.model) == {kind}


def test_its_logits_are_near_the_exact_ones(
    quantised: Loaded, tiny_prompt: dict[str, torch.Tensor], tiny_logits: torch.Tensor
) -> None:
    actual = logits_of(quantised[1], tiny_prompt)
    assert error(actual, tiny_logits) < 0.1
    agreement = (actual.argmax(-1) == tiny_logits.argmax(-1)).float().mean().item()
    is_int4 = Int4Linear in kinds_in(quantised[1])
    assert agreement >= (0.8 if is_int4 else 0.9)


def test_it_answers_as_well_about_pictures(quantised: Loaded) -> None:
    rows, _ = load_data(ROOT / "tests" / "pictures" / "questions.jsonl", quantised[2])
    tables = [
        evaluate(model, processor, rows, max_new_tokens=64, limit=60)
        for _, model, processor in (load_model("tiny", device="cpu"), quantised)
    ]
    plain, right = (table.total.right for table in tables)
    assert right >= plain - 2, f"{right} instead of {plain} right answers"


@KINDS
def test_float_weights_are_let_go_as_quantised_ones_come(kind: type[QuantizedLinear]) -> None:
    model = tiny_in(torch.float32)
    weights = [weakref.ref(module.weight) for module in model.modules() if isinstance(module, nn.Linear)]
    quantize_layers(model, kind)
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
        ("cpu", "int3", "Unknown quantize 'int3'; try int8 or int4"),
    ],
)
def test_what_cannot_be_quantised_is_said_before_anything_is_loaded(device: str, quantize: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_quantization(torch.device(device), quantize)


def test_an_unknown_kind_is_an_error_of_loading(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown quantize 'int5'"):
        load_pretrained_model(tmp_path, device="cpu", quantize="int5")

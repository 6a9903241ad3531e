"""Weight-only quantisation by torchao, which needs no GPU for int8."""

import copy
import sys

import pytest
import torch
from conftest import ROOT, Loaded, messages_of

from deepseek_vl.engine.engine import engine_of
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.imaging.open import load_image
from deepseek_vl.kernels.weight_only import quantize_weights, stored_bytes
from deepseek_vl.serve.inference import load_model, stream_answer


def colour_of_the_star(loaded: Loaded) -> str:
    _, model, processor = loaded
    messages = messages_of("<image_placeholder>What colour is the star?", load_image(ROOT / "images" / "shapes.png"))
    return "".join(stream_answer(model, processor, messages, GenerationSettings(max_new_tokens=40))).strip()


@pytest.fixture
def tiny() -> Loaded:
    return load_model("tiny", device="cpu", dtype="float32")


def test_without_torchao_it_is_said_what_to_install(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match="pip install torchao"):
        quantize_weights(tiny[1].language_model, "int8")


def test_int4_is_for_bfloat16(tiny: Loaded) -> None:
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match="--dtype bfloat16"):
        quantize_weights(tiny[1].language_model, "int4")


@pytest.mark.parametrize("is_compiled", [False, True])
def test_int8_weights_answer_almost_the_same(tiny: Loaded, is_compiled: bool) -> None:
    pytest.importorskip("torchao")
    _, model, processor = tiny
    ids = torch.arange(100)[None]
    with torch.no_grad():
        plain = copy.deepcopy(model.language_model)(input_ids=ids).logits
        quantize_weights(model.language_model, "int8")
        logits = model.language_model(input_ids=ids).logits
    assert 0 < (logits - plain).norm() / plain.norm() < 0.05
    layers = [module for module in model.language_model.modules() if isinstance(module, torch.nn.Linear)]
    assert {type(layer.weight).__name__ for layer in layers} == {"Int8Tensor"}
    for layer in layers:  # one byte per weight, and one scale per output
        assert 4 <= stored_bytes(layer.weight) / layer.out_features - layer.in_features <= 8

    if is_compiled:
        engine_of(model, processor.tokenizer).compile()
    assert colour_of_the_star(tiny) == "The star is blue."


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_on_a_gpu_all_kinds_answer(kind: str, is_compiled: bool) -> None:
    pytest.importorskip("torchao")
    loaded = load_model("tiny", device="cuda", dtype="bfloat16", quantize=kind)
    if is_compiled:
        engine_of(loaded[1], loaded[0]).compile()
    assert colour_of_the_star(loaded) == "The star is blue."

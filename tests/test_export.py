"""The model as a graph: torch.export, torch.compile without graph breaks, and ONNX of tower and projector."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IMAGE_TAG, ROOT, make_picture
from PIL import Image

from deepseek_vl import (
    DeepseekVLForConditionalGeneration,
    DeepseekVLProcessor,
    MultiModalityCausalLM,
    VLChatProcessor,
)
from deepseek_vl.utils.io import load_pretrained_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Image.Image]:
    folder = tmp_path_factory.mktemp("pictures")
    return [Image.open(make_picture(folder / f"{i}.png", (40, 30), seed=i)).convert("RGB") for i in range(4)]


TEXTS = [f"{IMAGE_TAG}What is this? {IMAGE_TAG}", f"{IMAGE_TAG}And this?"]


def prepared(name: str, checkpoint: Path, pictures: list[Image.Image]) -> tuple[torch.nn.Module, dict[str, Any], dict]:
    """A model, a batch of two rows with two and one pictures, and another batch of the same shape."""
    if name == "DeepseekVL":
        model = DeepseekVLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        processor = DeepseekVLProcessor.from_pretrained(checkpoint)
    else:
        model = MultiModalityCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        processor = VLChatProcessor.from_pretrained(checkpoint)
    batches = []
    for texts, images in ((TEXTS, pictures[:3]), ([TEXTS[0].replace("What", "Warp"), TEXTS[1]], pictures[1:])):
        if name == "masks":
            groups = (images[:2], images[2:])
            items = [
                processor.process_one(prompt=text, images=group) for text, group in zip(texts, groups, strict=True)
            ]
            batch = dict(processor.batchify(items))
            del batch["sft_format"]
        else:
            batch = dict(processor(text=texts, images=images))
        batches.append({**batch, "use_cache": False})
    return model.eval(), *batches


@pytest.mark.parametrize("name", ["masks", "mm_token_type_ids", "DeepseekVL"])
def test_the_whole_model_is_exported(checkpoint, pictures, name):
    """The exported program takes a fixed number of pictures, which may be divided unequally among rows."""
    model, batch, other = prepared(name, checkpoint, pictures)
    with torch.no_grad():
        program = torch.export.export(model, (), batch, strict=False)
        for inputs in (batch, other):
            exported = program.module()(**inputs)
            torch.testing.assert_close(exported.logits, model(**inputs).logits, rtol=0, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["masks", "mm_token_type_ids", "DeepseekVL"])
def test_the_forward_pass_compiles_into_one_graph(checkpoint, pictures, name):
    model, batch, other = prepared(name, checkpoint, pictures)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for inputs in (batch, other):
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("kind", [pytest.param("siglip", marks=pytest.mark.long), "hybrid"])
def test_what_load_pretrained_model_gives_compiles_too(request, kind, pictures):
    """The model with the kernels for this processor compiles with the default backend, and has gradients."""
    checkpoint = request.getfixturevalue(f"{kind}_checkpoint")
    _, processor, model = load_pretrained_model(checkpoint, device="cpu", dtype="float32")
    batch = dict(processor(text=TEXTS, images=pictures[:3]), use_cache=False)
    expected = model(**batch, labels=batch["input_ids"])
    expected.loss.backward()
    gradient = model.aligner.layers[-1].weight.grad.clone()
    model.zero_grad()
    torch._dynamo.reset()
    output = torch.compile(model, fullgraph=True)(**batch, labels=batch["input_ids"])
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-3)
    torch.testing.assert_close(model.aligner.layers[-1].weight.grad, gradient, rtol=1e-3, atol=1e-5)


def test_onnx_of_tower_and_projector(checkpoint, pictures, tmp_path, monkeypatch):
    """The snippet of `docs/engines.md` runs, and ONNX Runtime computes the same features."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript: pip install onnxscript")
    chapter = (ROOT / "docs/engines.md").read_text(encoding="utf-8").split("\n## Graphs")[1]
    code = re.search(r"```python\n(.*?)```", chapter, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace('"tiny"', repr(str(checkpoint))), names)
    session = onnxruntime.InferenceSession("encoder.onnx", providers=["CPUExecutionProvider"])
    for picture in pictures:
        pixels = names["processor"].image_processor([picture], return_tensors="pt")["pixel_values"]
        (features,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
        with torch.no_grad():
            expected = names["model"].get_image_features(pixels)
        torch.testing.assert_close(torch.from_numpy(features), expected, rtol=0, atol=1e-3)

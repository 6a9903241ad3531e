"""Our GGUF files in llama.cpp itself, compared with our own model.

Needs the package llama-cpp-python, which takes a quarter of an hour to build: `pip install llama-cpp-python==0.3.36`,
then `python -m pytest -m "long or not long" tests/test_llama_cpp.py`.
"""

import importlib
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Loaded, write_checkpoint
from PIL import Image

from deepseek_vl.checkpoints.tokenizer import encode
from deepseek_vl.convert import main
from deepseek_vl.data.checks import load_data
from deepseek_vl.imaging.open import load_image
from deepseek_vl.models import VLChatProcessor
from deepseek_vl.models.processing_vlm import BatchedVLChatProcessorOutput
from deepseek_vl.serve.inference import load_model
from deepseek_vl.utils.io import load_pil_images

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def llama() -> Iterator[ModuleType]:
    """The module `benchmarks/llama_cpp_peer.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("llama_cpp_peer")


@pytest.fixture(scope="module")
def peer(llama: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """A function that converts a checkpoint to GGUF with a type of weights, and opens it in llama.cpp."""
    opened = []

    def open_files(source: str | Path, kind: str) -> Any:
        directory = tmp_path_factory.mktemp("gguf") / kind
        assert main([str(source), str(directory), "--to", "gguf", "--type", kind]) == 0
        opened.append(llama.LlamaCpp(directory / f"model-{kind}.gguf", directory / "mmproj-f16.gguf"))
        return opened[-1]

    yield open_files
    for model in opened:
        model.close()


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    return load_model("tiny", device="cpu", dtype="float32")


def squares(processor: Any, images: list[Image.Image]) -> list[np.ndarray]:
    """Pictures at the towers' size, uint8 [S, S, 3], so that llama.cpp does not resize them."""
    return [processor.image_processor.resize(image).transpose(1, 2, 0) for image in images]


def our_features(model: Any, inputs: BatchedVLChatProcessorOutput) -> np.ndarray:
    """The image features of our model: float32 [n, N, width]."""
    with torch.inference_mode():
        return model.aligner(model.vision_model(inputs.pixel_values[0])).numpy()


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first * second).sum(-1) / np.linalg.norm(first, axis=-1) / np.linalg.norm(second, axis=-1)


def test_image_features_are_ours(tiny: Loaded, peer: Any) -> None:
    _, model, processor = tiny
    theirs = peer("tiny", "f16")
    for file in sorted((ROOT / "images").glob("*.png"))[:6]:
        image = load_image(file)
        inputs = processor(prompt="<image_placeholder>", images=[image])
        (square,) = squares(processor, [image])
        assert cosines(theirs.image_features(square), our_features(model, inputs)[0]).min() >= 0.9999


@pytest.mark.parametrize(("kind", "others"), [("f16", 2), ("q8_0", 5)])
def test_answers_about_pictures_are_ours(kind: str, others: int, tiny: Loaded, peer: Any, llama: ModuleType) -> None:
    """All answers to the 145 questions of `tests/pictures` equal ours, token for token, except for at most `others`."""
    tokenizer, model, processor = tiny
    theirs = peer("tiny", kind)
    rows, _ = load_data(ROOT / "tests" / "pictures" / "questions.jsonl", processor)
    asked = [row.messages[:end] for row in rows for end in range(1, len(row.messages), 2)]
    different = []
    for messages in asked:
        conversation = [*messages, {"role": "Assistant", "content": ""}]
        images = load_pil_images(conversation)
        inputs = processor(conversations=conversation, images=images)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs.input_ids.shape[1] :].tolist()
        ours = [token for token in ids if token != tokenizer.eos_token_id]
        features = [theirs.image_features(square) for square in squares(processor, images)]
        if theirs.answer(llama.positions_of(inputs, features), 64, tokenizer.eos_token_id) != ours:
            different.append(messages[-1]["content"])
    assert len(asked) >= 145
    assert len(different) <= others, different


def texts(count: int) -> list[str]:
    """Random mixtures of English, Chinese, code, numbers, emoji, white space, and special tokens as text."""
    sources = [
        text
        for text in (file.read_text(encoding="utf-8") for file in sorted((ROOT / "deepseek_vl").rglob("*.py")))
        if text
    ]
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    odd = "0 1234567 3.14 café ß Ωmega привет こんにちは 안녕 مرحبا 🙂 👩‍👩‍👧 🇩🇪 ½ — … «» User:".split(" ")  # noqa: SIM905
    odd += ["\n\n", "\t", "  ", "\r\n", "\u00a0", "<｜end▁of▁sentence｜>", "<image_placeholder>"]
    chosen = random.Random(0)
    found = []
    for _ in range(count):
        pieces = []
        for _ in range(chosen.randint(1, 12)):
            source = chosen.choice(sources)
            start = chosen.randrange(len(source))
            pieces += [
                chosen.choice(
                    (
                        source[start : start + chosen.randint(1, 80)],
                        " ".join(chosen.choices(words, k=chosen.randint(1, 12))),
                        "".join(chr(chosen.randint(0x4E00, 0x9FA5)) for _ in range(chosen.randint(1, 12))),
                        chosen.choice(odd),
                    )
                )
            ]
        found.append(chosen.choice(("", " ")).join(pieces))
    return found


def test_the_published_tokenizers_ids_are_ours(
    published_tokenizer_dir: Path, peer: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint = write_checkpoint("siglip", published_tokenizer_dir, tmp_path_factory.mktemp("published"))
    theirs, processor = peer(checkpoint, "f16"), VLChatProcessor.from_pretrained(str(checkpoint))
    different = []
    for text in texts(1000):
        ours = encode(processor.tokenizer, text, [(0, len(text))], processor.image_tag)[0]
        if theirs.tokens(text) != [token for token in ours if token != processor.tokenizer.bos_token_id]:
            different.append(text)
    assert not different, different[:3]


@pytest.mark.long
def test_a_random_model_of_the_published_size(published_tokenizer_dir: Path, peer: Any, tmp_path: Path) -> None:
    """The 1.3B: image features agree, and so does the next token at 200 positions where it is no near-tie."""
    directory = tmp_path / "random"
    command = [
        sys.executable, ROOT / "benchmarks" / "random_checkpoint.py", "--size", "1.3b",
        "--tokenizer", published_tokenizer_dir, "--output", directory,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    theirs = peer(directory, "f16")
    _, model, processor = load_model(str(directory), device="cpu", dtype="float32")
    image = load_image(ROOT / "images" / "shapes.png")
    inputs = processor(prompt="<image_placeholder>", images=[image])
    (square,) = squares(processor, [image])
    features = theirs.image_features(square)
    assert cosines(features, our_features(model, inputs)[0]).min() >= 0.9999
    ids = torch.randint(0, 100_000, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model.language_model(input_ids=ids).logits[0].numpy()
    theirs.forget()
    other = theirs.run(ids[0].tolist(), 200)
    rounding = np.abs(other - logits).max(-1)
    first, second = np.sort(logits, -1)[:, :-3:-1].T
    clear = first - second > 2 * rounding.mean()
    assert clear.sum() >= 100
    assert (other.argmax(-1) == logits.argmax(-1))[clear].all()

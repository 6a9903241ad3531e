"""The 1.3B layout at full size, with random weights: loading, memory, a picture, a chat in a terminal.

Takes minutes, 8 GB of disk and 8 GB of memory, and the published tokenizer.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import psutil
import pytest
import torch
from conftest import ROOT, STOCK, make_picture, messages_of, stock_inputs
from PIL import Image
from terminal_chat import PATH, Chat

from benchmarks.random_checkpoint import write_random_checkpoint
from deepseek_vl.convert import convert
from deepseek_vl.utils.io import load_pretrained_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def full_checkpoint(published_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint written by the documented command, and removed after this file's tests."""
    if psutil.virtual_memory().available < 8e9:
        pytest.skip("needs 8 GB of free memory")
    directory = tmp_path_factory.mktemp("full") / "1.3b"
    command = [sys.executable, str(ROOT / "benchmarks" / "random_checkpoint.py"), "--size", "1.3b"]
    command += ["--tokenizer", str(published_tokenizer_dir), "--output", str(directory)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=900)
    yield directory
    shutil.rmtree(directory)


def test_it_is_the_published_layout(full_checkpoint: Path) -> None:
    files = {path.name for path in full_checkpoint.iterdir()}
    assert {"config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json"} <= files
    assert "model-00001-of-00002.safetensors" in files


def test_loading_needs_hardly_more_memory_than_the_weights(full_checkpoint: Path) -> None:
    code = f"""
import resource, torch
from deepseek_vl.utils.io import load_pretrained_model
_, _, model = load_pretrained_model({str(full_checkpoint)!r}, device="cpu", dtype="bfloat16")
assert {{parameter.dtype for parameter in model.parameters()}} == {{torch.bfloat16}}
weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
print(weights, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=600)
    weights, peak = map(int, result.stdout.split())
    assert weights == 3_950_471_168
    assert peak <= 1.15 * weights + 1e9


def test_converting_needs_hardly_more_memory_than_the_largest_tensor(full_checkpoint: Path, tmp_path: Path) -> None:
    code = f"""
import resource
from pathlib import Path
from deepseek_vl.convert import convert
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
convert(Path({str(full_checkpoint)!r}), Path({str(tmp_path / "exported")!r}), "transformers")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=600)
    before, peak = map(int, result.stdout.split())
    assert peak - before < 2 * 102400 * 2048 * 2 < 1e9  # two of the largest tensors, far less than a shard


@pytest.mark.parametrize(("size", "kind"), [("1.3b", "siglip"), pytest.param("7b", "hybrid", marks=pytest.mark.long)])
def test_transformers_own_class_agrees_at_full_width(
    size: str, kind: str, published_tokenizer_dir: Path, tmp_path: Path
) -> None:
    """transformers' own class computes the same, with whole towers and two layers of the language model."""
    reference, exported = tmp_path / "reference", tmp_path / "exported"
    write_random_checkpoint(size, str(published_tokenizer_dir), str(reference), language_layers=2)
    convert(reference, exported, "transformers")
    picture = Image.open(ROOT / "images" / "shapes.png").convert("RGB")
    messages = messages_of("<image_placeholder>What is this?", picture)

    _, processor, ours = load_pretrained_model(reference, device="cpu", dtype="float32")
    batch = processor(conversations=messages, images=[picture])
    inputs = stock_inputs(ours, batch)
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    prompt = batch.input_ids.shape[1]
    with torch.no_grad():
        logits = ours(**batch, logits_to_keep=64).logits
    tokens = ours.generate(**batch, **options)[:, prompt:]
    del ours
    stock = STOCK[kind].from_pretrained(exported, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits, stock(**inputs, logits_to_keep=64).logits, rtol=0, atol=1e-4)
    assert torch.equal(tokens, stock.generate(**inputs, **options)[:, prompt:])


def test_inference_on_a_picture(full_checkpoint: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "inference.py"),
        "--model_path",
        str(full_checkpoint),
        "--max_new_tokens",
        "8",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=900)
    prompt, answer = result.stdout.split("\n\nAssistant:")
    assert prompt.endswith("User: <image_placeholder>Describe each stage of this image.")
    assert answer.strip()


def test_two_turns_with_an_image_each_in_a_terminal(full_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--max_gen_len", "8", "--dtype", "bfloat16"]
    chat = Chat(full_checkpoint, *arguments, patience=600, cwd=str(ROOT))
    for picture in (ROOT / "images" / "training_pipelines.png", make_picture(tmp_path / "second.png")):
        chat.enter("<image_placeholder>Describe this image.", f"(1/1) {PATH}")
        assert chat.ask(str(picture))
    chat.press("exit\r")
    chat.process.expect(pexpect.EOF)
    chat.process.close()
    assert chat.process.exitstatus == 0

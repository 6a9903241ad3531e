"""`embed_images`: pictures as vectors."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_picture
from PIL import Image
from torch.nn.functional import normalize

from deepseek_vl import MultiModalityCausalLM, VLChatProcessor, load_pretrained_model
from deepseek_vl.engine.features import embed_images
from deepseek_vl.imaging.open import ImageLoadError, load_image


def test_the_mean_is_over_all_patches_of_each_tower(
    model: MultiModalityCausalLM, processor: VLChatProcessor, picture_files: list[Path]
) -> None:
    vectors = embed_images(model, processor, picture_files, batch_size=2)
    images = [load_image(file) for file in picture_files]
    with torch.no_grad():
        features = model.vision_model(processor.image_processor(images, return_tensors="pt")["pixel_values"])
    towers = features if isinstance(features, tuple) else (features,)
    torch.testing.assert_close(vectors, torch.cat([tower.mean(1) for tower in towers], -1), rtol=1e-4, atol=1e-5)
    assert vectors.shape == (3, 48 * len(towers))
    assert not vectors.requires_grad
    assert len({tuple(vector.tolist()) for vector in vectors}) == 3


def test_attention_is_what_siglip_itself_pools_to(
    own_model: MultiModalityCausalLM, processor: VLChatProcessor, picture_files: list[Path]
) -> None:
    vectors = embed_images(own_model, processor, picture_files, "attention")
    siglip = getattr(own_model.vision_model, "vision_tower_low", own_model.vision_model).vision_tower
    siglip.ignore_head = False  # the tower then returns the pooled output of its head
    images = processor.image_processor([load_image(file) for file in picture_files], return_tensors="pt")
    with torch.no_grad():
        pooled = own_model.vision_model(images["pixel_values"])
    pooled = pooled[1] if isinstance(pooled, tuple) else pooled
    torch.testing.assert_close(vectors, pooled, rtol=1e-4, atol=1e-5)
    assert vectors.shape == (3, 48)


def test_pictures_are_opened_a_batch_at_a_time(
    model: MultiModalityCausalLM, processor: VLChatProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, most = [], 0

    def images() -> Iterator[Image.Image]:
        for number in range(7):
            opened.append(number)
            yield Image.new("RGB", (20, 20), (30 * number, 0, 0))

    def forward(pixels: torch.Tensor, of_tower=model.vision_model.forward) -> torch.Tensor:
        nonlocal most
        most = max(most, len(opened))
        opened.clear()
        return of_tower(pixels)

    monkeypatch.setattr(model.vision_model, "forward", forward)
    assert len(embed_images(model, processor, images(), batch_size=3)) == 7
    assert most == 3


def test_what_cannot_be_embedded_is_a_clear_error(
    model: MultiModalityCausalLM, processor: VLChatProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="Unknown pooling 'max'; known are mean, attention"):
        embed_images(model, processor, [], "max")
    with pytest.raises(ValueError, match="no pictures"):
        embed_images(model, processor, [])
    with pytest.raises(ImageLoadError, match=r"nothing\.png"):
        embed_images(model, processor, [tmp_path / "nothing.png"])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        embed_images(model, processor, [tmp_path / "nothing.png"], batch_size=0)
    siglip = getattr(model.vision_model, "vision_tower_low", model.vision_model).vision_tower
    monkeypatch.setattr(siglip, "attn_pool", None)
    with pytest.raises(ValueError, match='use "mean"'):
        embed_images(model, processor, [], "attention")


def test_one_picture_need_not_be_in_a_list(
    model: MultiModalityCausalLM, processor: VLChatProcessor, picture_files: list[Path]
) -> None:
    expected = embed_images(model, processor, picture_files[:1])
    for one in (picture_files[0], str(picture_files[0]), load_image(picture_files[0]), picture_files[0].read_bytes()):
        assert torch.equal(embed_images(model, processor, one), expected)
    assert not expected.is_inference()


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_a_picture_is_found_by_a_smaller_copy_of_it(pooling: str, tmp_path: Path, one_thread: None) -> None:
    _, processor, tiny = load_pretrained_model("tiny", device="cpu")
    files = sorted((ROOT / "tests" / "pictures").glob("*.png"))[:16]
    vectors = normalize(embed_images(tiny, processor, files, pooling), dim=-1)
    copies = []
    for file in files:
        image = load_image(file)
        copies.append(image.resize((image.width * 3 // 4, image.height * 3 // 4)))
    queries = normalize(embed_images(tiny, processor, copies, pooling), dim=-1)
    assert (queries @ vectors.T).argmax(dim=-1).tolist() == list(range(len(files)))


def test_the_example_finds_a_picture_by_another(tmp_path: Path) -> None:
    for seed in range(4):
        make_picture(tmp_path / f"{seed}.png", seed=seed)
    make_picture(tmp_path / "query.bmp", size=(60, 40), seed=2)
    command = [sys.executable, ROOT / "examples" / "find_picture.py", tmp_path / "query.bmp", tmp_path, "--count", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("1.000") and lines[0].endswith("query.bmp")
    assert lines[1].endswith("2.png")

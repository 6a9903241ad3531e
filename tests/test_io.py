"""Loading of images, JSON files and checkpoints, and the errors when they cannot be read."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_url, make_picture, png_that_declares
from PIL import Image

from deepseek_vl.imaging.open import ImageLoadError
from deepseek_vl.kernels.device import pick_device, pick_dtype
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.utils.io import load_json, load_pil_images, load_pretrained_model


def load_one(source) -> Image.Image:
    """One image through the public function."""
    (image,) = load_pil_images([{"role": "User", "content": "<image_placeholder>", "images": [source]}])
    return image


SOURCES = {
    "str": str,
    "Path": lambda path: path,
    "file object": lambda path: path.open("rb"),
    "BytesIO": lambda path: io.BytesIO(path.read_bytes()),
    "bytes": Path.read_bytes,
    "data URL": lambda path: data_url(path.read_bytes()),
}


# Images


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_gives_the_same_rgb_image(picture, kind):
    image = load_one(SOURCES[kind](picture))
    assert (image.mode, image.size) == ("RGB", (90, 60))
    with Image.open(picture) as expected:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_a_pil_image_in_rgb_passes_through():
    image = Image.new("RGB", (3, 2), (1, 2, 3))
    assert load_one(image).tobytes() == image.tobytes()


def test_the_home_directory_is_expanded(picture, monkeypatch):
    monkeypatch.setenv("HOME", str(picture.parent))
    assert load_one("~/picture.png").size == (90, 60)
    assert load_one(Path("~/picture.png")).size == (90, 60)


def test_images_come_in_reading_order(tmp_path):
    first, second, third = (make_picture(tmp_path / f"{i}.png", (10 + i, 5), seed=i) for i in range(3))
    conversation = [
        {"role": "User", "content": "<image_placeholder><image_placeholder>", "images": [str(third), first]},
        {"role": "Assistant", "content": "Nice."},
        {"role": "User", "content": "No image.", "images": []},
        {"role": "Assistant", "content": "", "images": None},
        {"role": "User", "content": "<image_placeholder>", "images": (second.read_bytes(),)},
    ]
    assert [image.width for image in load_pil_images(conversation)] == [12, 10, 11]


@pytest.mark.parametrize("conversation", [[], [{"role": "User", "content": "Hi"}]], ids=["empty", "text only"])
def test_a_conversation_without_images_gives_none(conversation):
    assert load_pil_images(conversation) == []


def test_a_message_instead_of_messages_is_said() -> None:
    with pytest.raises(ValueError, match="takes a list of messages"):
        load_pil_images({"role": "User", "content": "Hi"})


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("L", (4, 3), 7), (7, 7, 7)),
        (Image.new("1", (4, 3), 1), (255, 255, 255)),
        (Image.new("RGBA", (4, 3), (1, 2, 3, 0)), (1, 2, 3)),
        (Image.new("RGB", (4, 3), (1, 2, 3)).convert("P", palette=Image.Palette.ADAPTIVE), (1, 2, 3)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
@pytest.mark.parametrize("from_file", [True, False], ids=["file", "PIL image"])
def test_every_mode_becomes_rgb(tmp_path, image, colour, from_file):
    image.save(tmp_path / "image.png")
    loaded = load_one(tmp_path / "image.png" if from_file else image)
    assert loaded.mode == "RGB"
    assert loaded.getcolors() == [(12, colour)]


# What each EXIF orientation asks for, on [height, width, channel] arrays.
UPRIGHT = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: np.rot90,
}


def make_turned_picture(path: Path, orientation: int) -> Path:
    """A picture of 90 x 60 pixels whose EXIF data say how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(make_picture(path)) as picture:
        picture.load()
    picture.save(path, exif=exif)
    return path


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_file_is_turned_upright_as_its_exif_orientation_says(tmp_path, orientation):
    path = make_turned_picture(tmp_path / "turned.png", orientation)
    with Image.open(path) as stored:
        expected = UPRIGHT[orientation](np.asarray(stored))
    np.testing.assert_array_equal(np.asarray(load_one(path)), expected)


@pytest.mark.parametrize("kind", SOURCES)
def test_exif_orientation_is_applied_to_every_kind_of_file(tmp_path, kind):
    path = make_turned_picture(tmp_path / "turned.png", 6)
    assert load_one(SOURCES[kind](path)).size == (60, 90)


def test_exif_orientation_is_not_applied_to_a_pil_image(tmp_path):
    """A PIL image is taken as it is: the caller may have turned it already."""
    with Image.open(make_turned_picture(tmp_path / "turned.png", 6)) as opened:
        loaded = load_one(opened)
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(opened))
    assert loaded.size == (90, 60)


# Images that cannot be read


def write_broken(kind: str, directory: Path) -> Path:
    """Write something that cannot be read as an image; returns its path."""
    path = directory / f"broken {kind}.{'jpg' if 'JPEG' in kind else 'png'}"
    if kind == "directory":
        path.mkdir()
    elif kind == "text":
        path.write_text("This is no image.")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind.startswith("truncated"):
        content = make_picture(path).read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif kind == "bomb":
        path.write_bytes(png_that_declares(10_000, 10_000))
    elif kind == "huge bomb":
        path.write_bytes(png_that_declares(1_000_000, 1_000_000))
    return path


BROKEN = {
    "missing": "no such file",
    "directory": "is a directory",
    "text": "not an image",
    "empty": "not an image",
    "truncated JPEG": "truncated",
    "truncated PNG": "truncated",
    "bomb": "100000000 pixels|10000x10000 pixels",
    "huge bomb": "1000000000000 pixels|1000000x1000000 pixels",
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("as_type", [str, Path], ids=["str", "Path"])
def test_a_broken_file_is_one_error_that_names_the_file_and_the_cause(tmp_path, kind, as_type):
    path = write_broken(kind, tmp_path)
    with pytest.raises(ImageLoadError, match=f"(?i){BROKEN[kind]}") as caught:
        load_one(as_type(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", [kind for kind in BROKEN if kind not in ("missing", "directory")])
@pytest.mark.parametrize("source", ["file object", "BytesIO", "bytes", "data URL"])
def test_broken_content_is_the_same_error_from_every_source(tmp_path, kind, source):
    path = write_broken(kind, tmp_path)
    with pytest.raises(ImageLoadError, match=f"(?i){BROKEN[kind]}") as caught:
        load_one(SOURCES[source](path))
    if source == "file object":
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_pil_image_whose_file_turns_out_truncated_is_the_same_error(tmp_path, mode):
    """Pillow opens lazily: the pixels are read only when somebody needs them."""
    path = tmp_path / "truncated.png"
    with Image.open(make_picture(path)) as picture:
        picture.convert(mode).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with Image.open(path) as opened, pytest.raises(ImageLoadError, match="truncated") as caught:
        load_one(opened)
    assert str(path) in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_on_pixels_is_pillows(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    assert load_one(make_picture(tmp_path / "most.png", (30, 20))).size == (30, 20)
    with pytest.raises(ImageLoadError, match="600"):
        load_one(make_picture(tmp_path / "more.png", (31, 20)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data:image/png;base64,@@@@", "base64"),
        ("data:image/png;base64,abc", "not an image"),
        ("data:image/png;base64,é", "base64"),
        ("data:image/png,abcd", "not an image"),
        ("data:text/plain;base64,aGVsbG8=", "not an image"),
        (data_url(b"hello"), "not an image"),
        ("http://example.com/cat.png", "http://example.com/cat.png"),
        ("https://example.com/cat.png", "https://example.com/cat.png"),
        ("~no-such-user-here/cat.png", "~no-such-user-here/cat.png"),
        ("a\0b.png", "null"),
        (b"hello", "not an image"),
        (42, "int"),
        (None, "NoneType"),
        (np.zeros((2, 2, 3), dtype=np.uint8), "ndarray"),
        (io.StringIO("hello"), "StringIO"),
    ],
    ids=lambda value: f"{value:.30}" if isinstance(value, str) else type(value).__name__,
)
def test_a_source_of_the_wrong_kind_is_the_same_error(source, message):
    with pytest.raises(ImageLoadError, match=message):
        load_one(source)


def test_the_error_is_what_callers_of_pillow_and_of_the_processor_catch(tmp_path):
    for kind in (OSError, ValueError):
        with pytest.raises(kind, match=r"missing\.png"):
            load_one(tmp_path / "missing.png")


def test_the_error_names_the_image_that_is_broken_and_not_its_neighbours(picture):
    broken = write_broken("text", picture.parent)
    with pytest.raises(ImageLoadError) as caught:
        load_pil_images([{"images": [picture]}, {"images": [picture, broken]}])
    assert str(broken) in str(caught.value)
    assert str(picture) not in str(caught.value)


# JSON


@pytest.mark.parametrize("as_type", [str, Path], ids=["str", "Path"])
def test_load_json_reads_utf_8(tmp_path, as_type):
    content = {"请": ["é", 1, None]}
    (tmp_path / "file.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    assert load_json(as_type(tmp_path / "file.json")) == content


# Device and dtype


def test_the_device_is_the_best_there_is_unless_one_is_asked_for():
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device().type == best
    assert pick_device("auto").type == best
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 0)])
def test_a_gpu_can_be_asked_for(device):
    assert pick_device(device) == torch.device(device)


@pytest.mark.parametrize("device", ["gpu", "", "cuda:first"])
def test_a_device_that_is_none_is_a_value_error_that_names_it(device):
    with pytest.raises(ValueError, match=f"'{device}'"):
        pick_device(device)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
def test_a_device_that_is_not_there_is_a_value_error_that_names_it(device):
    backend = torch.cuda if device.startswith("cuda") else torch.backends.mps
    if backend.is_available():
        pytest.skip(f"this machine has {device}")
    with pytest.raises(ValueError, match=device):
        pick_device(device)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", torch.float32),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_dtype_that_is_asked_for_is_taken_on_every_device(device, dtype, expected):
    assert pick_dtype(torch.device(device), dtype) is expected


def test_on_the_cpu_the_dtype_is_one_that_it_computes_fast():
    assert pick_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float16, torch.float32)
    assert pick_dtype(torch.device("cpu"), "auto") is pick_dtype(torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_dtype_is_bfloat16_where_the_hardware_has_it():
    has_it = torch.cuda.get_device_capability() >= (8, 0)
    assert pick_dtype(torch.device("cuda")) is (torch.bfloat16 if has_it else torch.float16)


@pytest.mark.parametrize("dtype", ["int8", "int64", "bool", "half precision", "nn", "Tensor", ""])
def test_a_name_of_no_floating_point_dtype_is_a_value_error_that_names_it(dtype):
    with pytest.raises(ValueError, match=f"'{dtype}'"):
        pick_dtype(torch.device("cpu"), dtype)


# Checkpoints


@pytest.mark.parametrize("as_type", [str, Path], ids=["str", "Path"])
@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16], ids=str)
def test_a_checkpoint_gives_tokenizer_processor_and_model(checkpoint, as_type, dtype):
    tokenizer, processor, model = load_pretrained_model(as_type(checkpoint), device="cpu", dtype=dtype)
    assert type(processor) is VLChatProcessor
    assert tokenizer is processor.tokenizer
    assert type(model) is MultiModalityCausalLM
    assert not model.training
    expected = getattr(torch, str(dtype).removeprefix("torch."))
    assert {(tensor.dtype, tensor.device.type) for tensor in model.parameters()} == {(expected, "cpu")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_loaded_model_does_not_change_with_its_files(siglip_checkpoint, tmp_path, dtype):
    """Weights are read through a memory map, and none of the model's may still be in it."""
    shutil.copytree(siglip_checkpoint, tmp_path, dirs_exist_ok=True)
    _, _, model = load_pretrained_model(tmp_path, device="cpu", dtype=dtype)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    (file,) = tmp_path.glob("*.safetensors")
    with file.open("r+b") as opened:
        opened.seek(8 + int.from_bytes(opened.read(8), "little"))
        opened.write(bytes(file.stat().st_size - opened.tell()))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_without_a_dtype_the_model_gets_the_one_that_suits_the_device(siglip_checkpoint):
    _, _, model = load_pretrained_model(siglip_checkpoint, device="cpu")
    assert model.dtype is pick_dtype(torch.device("cpu"))


def test_the_home_directory_is_expanded_in_a_checkpoints_path(siglip_checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", str(siglip_checkpoint.parent))
    _, processor, _ = load_pretrained_model(f"~/{siglip_checkpoint.name}", device="cpu")
    assert processor.num_image_tokens == 16


@pytest.fixture
def offline(monkeypatch):
    """Disable access to the Hub, whose retries would take half a minute."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", ["{tmp}/missing", "./missing", "~/missing", "one/two/three", "missing/", ""])
def test_what_can_only_be_a_directory_is_not_asked_of_the_hub(tmp_path, name):
    name = name.format(tmp=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint directory|no config\.json") as caught:
        load_pretrained_model(name, device="cpu")
    assert name in str(caught.value)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["no-such-owner-here/no-such-model", "no-such-model"])
def test_a_checkpoint_that_is_neither_here_nor_on_the_hub_is_an_os_error_that_names_it(tmp_path, name):
    name = name.format(tmp=tmp_path)
    with pytest.raises(OSError, match="not a directory") as caught:
        load_pretrained_model(name, device="cpu")
    assert f"'{name}'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_config_is_an_error_that_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json") as caught:
        load_pretrained_model(tmp_path, device="cpu")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"hidden_size": 64}], ids=["llama", "no model_type"])
def test_a_checkpoint_of_another_model_is_a_value_error_that_names_both_types(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="multi_modality") as caught:
        load_pretrained_model(tmp_path, device="cpu")
    assert str(tmp_path) in str(caught.value)
    assert repr(config.get("model_type")) in str(caught.value)


def test_a_config_that_is_no_json_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises((OSError, ValueError), match="JSON") as caught:
        load_pretrained_model(tmp_path, device="cpu")
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "not a directory" not in str(caught.value)  # the directory exists


@pytest.mark.parametrize("missing", ["preprocessor_config.json", "tokenizer.json", "model.safetensors"])
def test_a_checkpoint_that_lacks_a_file_is_an_os_error_that_names_it(siglip_checkpoint, tmp_path, missing):
    shutil.copytree(siglip_checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / missing).unlink()
    with pytest.raises(OSError, match=missing.partition(".")[0]) as caught:
        load_pretrained_model(tmp_path, device="cpu")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("options", [{"device": "gpu"}, {"device": "cpu", "dtype": "int8"}], ids=["device", "dtype"])
def test_an_unknown_device_or_dtype_is_said_before_anything_is_loaded(tmp_path, options):
    with pytest.raises(ValueError, match="Unknown"):
        load_pretrained_model(tmp_path, **options)


@pytest.mark.parametrize("file", ["tokenizer.json", "processor_config.json", "preprocessor_config.json"])
def test_a_broken_json_file_of_a_checkpoint_is_named(siglip_checkpoint, tmp_path, file):
    for path in siglip_checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).write_text("{")
    with pytest.raises(OSError, match=file) as caught:
        load_pretrained_model(tmp_path, device="cpu")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("length", [0, 5, 1000, -1000])
def test_truncated_weights_are_an_error_that_names_the_file(siglip_checkpoint, tmp_path, length):
    for path in siglip_checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(OSError, match=r"model\.safetensors.*(broken|truncated)"):
        load_pretrained_model(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_dtype_may_have_either_name(siglip_checkpoint, name):
    _, _, model = load_pretrained_model(siglip_checkpoint, device="cpu", **{name: torch.float16})
    assert model.dtype == torch.float16


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer.json", "{}"), ("model.safetensors", "garbage"), ("config.json", '{"model_type": "multi_modality"}')],
)
def test_a_checkpoint_of_broken_files_is_an_error_that_names_it(siglip_checkpoint, tmp_path, file, content):
    for path in siglip_checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).write_text(content)
    with pytest.raises((OSError, ValueError)) as caught:
        load_pretrained_model(tmp_path, device="cpu")
    assert str(caught.value)


def test_the_images_of_a_message_may_be_a_single_one(picture):
    assert len(load_pil_images([{"role": "User", "content": "", "images": str(picture)}])) == 1

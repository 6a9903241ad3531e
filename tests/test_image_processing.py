"""`VLMImageProcessor`: from any PIL image to the square of pixels that the vision tower gets."""

import json

import numpy as np
import PIL
import pytest
import torch
from conftest import make_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor

from deepseek_vl.imaging.square import expand2square
from deepseek_vl.models import VLMImageProcessor
from deepseek_vl.models.image_processing_vlm import (
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    VLMImageProcessorConfig,
)

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
WHITE = (255, 255, 255)

# The two published preprocessor_config.json files.
PUBLISHED = {
    "1.3b": {
        "background_color": [127, 127, 127],
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "VLMImageProcessor",
        "image_size": 384,
        "image_std": [0.5, 0.5, 0.5],
        "min_size": 14,
        "processor_class": "VLChatProcessor",
        "rescale_factor": 0.00392156862745098,
    },
    "7b": {
        "background_color": [122, 116, 104],
        "do_normalize": False,
        "image_mean": CLIP_MEAN,
        "image_processor_type": "VLMImageProcessor",
        "image_size": 1024,
        "image_std": CLIP_STD,
        "min_size": 14,
        "processor_class": "VLChatProcessor",
        "rescale_factor": 0.00392156862745098,
    },
}


oracle_is_pillow_13 = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13,
    reason="older versions of Pillow resize the axes in another order",
)


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A random RGB image of (width, height)."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def plain_square(image: Image.Image, image_size: int, min_size: int, background: tuple[int, int, int]) -> np.ndarray:
    """The expected output of `resize`, computed step by step: uint8 [3, S, S]."""
    width, height = image.size
    longer = max(width, height)
    new_width = max(int(width / longer * image_size), min_size)
    new_height = max(int(height / longer * image_size), min_size)
    pixels = np.asarray(image.convert("RGB").resize((new_width, new_height), resample=Image.BICUBIC))
    square = np.full((image_size, image_size, 3), background, dtype=np.uint8)
    top, left = (image_size - new_height) // 2, (image_size - new_width) // 2
    square[top : top + new_height, left : left + new_width] = pixels
    return np.moveaxis(square, -1, 0)


def white_box(processor: VLMImageProcessor, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a white image of (width, height) on the square."""
    white = (processor.resize(Image.new("RGB", size, WHITE)) == 255).all(0)
    rows, columns = white.any(1).nonzero()[0], white.any(0).nonzero()[0]
    assert white.sum() == len(rows) * len(columns)  # one full rectangle
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# Settings


def test_constants():
    assert list(IMAGENET_MEAN) == CLIP_MEAN
    assert list(IMAGENET_STD) == CLIP_STD
    assert list(IMAGENET_INCEPTION_MEAN) == [0.5, 0.5, 0.5]
    assert list(IMAGENET_INCEPTION_STD) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("cls", [VLMImageProcessor, VLMImageProcessorConfig])
def test_defaults(cls):
    config = cls(image_size=384)
    assert config.image_size == 384
    assert config.min_size == 14
    assert list(config.image_mean) == CLIP_MEAN
    assert list(config.image_std) == CLIP_STD
    assert config.rescale_factor == 1 / 255
    assert config.do_normalize is True


def test_the_config_under_which_the_processor_is_registered():
    assert VLMImageProcessorConfig.model_type == "deepseek_vlm"


@pytest.mark.parametrize("image_size", [384, 1024])
def test_default_shape_is_channels_first(image_size):
    assert list(VLMImageProcessor(image_size).default_shape) == [3, image_size, image_size]


@pytest.mark.parametrize(
    ("mean", "expected"),
    [
        ((0.5, 0.5, 0.5), (127, 127, 127)),
        (CLIP_MEAN, (122, 116, 104)),  # truncated: 122.77, 116.75, 104.09
        ((0.0, 1.0, 0.999), (0, 255, 254)),
        (None, (127, 127, 127)),
    ],
)
def test_background_colour_is_the_truncated_mean(mean, expected):
    processor = VLMImageProcessor(8, min_size=1, image_mean=mean)
    assert tuple(processor.background_color) == expected
    square = processor.resize(Image.new("RGB", (8, 2), WHITE))
    assert square[:, 0, 0].tolist() == list(expected)


def test_background_colour_follows_the_mean_whatever_the_file_says(tmp_path):
    file = {**PUBLISHED["7b"], "background_color": [1, 2, 3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(file))
    assert tuple(VLMImageProcessor.from_pretrained(tmp_path).background_color) == (122, 116, 104)
    assert tuple(VLMImageProcessor(8, background_color=(1, 2, 3)).background_color) == (122, 116, 104)


# resize


@pytest.mark.parametrize(
    ("image_size", "size", "expected"),
    [
        (32, (7, 5), (0, 5, 32, 27)),  # 5 / 7 * 32 = 22.86 -> 22 rows, where rounding would give 23
        (32, (5, 7), (5, 0, 27, 32)),
        (32, (97, 64), (0, 5, 32, 26)),  # 21.11 -> 21 rows: 5 above, 6 below
        (32, (64, 97), (5, 0, 26, 32)),
        (100, (100, 29), (0, 36, 100, 64)),  # 29 / 100 * 100 = 28.999999999999996 -> 28
        (384, (640, 427), (0, 64, 384, 320)),  # 256.2 -> 256
        (32, (32, 32), (0, 0, 32, 32)),
        (32, (3, 3), (0, 0, 32, 32)),  # small images are enlarged
        (32, (300, 300), (0, 0, 32, 32)),
        (32, (2000, 1), (0, 9, 32, 23)),  # never below min_size = 14
        (32, (1, 2000), (9, 0, 23, 32)),
    ],
)
def test_the_image_is_truncated_to_size_and_centred(image_size, size, expected):
    assert white_box(VLMImageProcessor(image_size), size) == expected


@pytest.mark.parametrize(("min_size", "rows"), [(1, 1), (2, 2), (14, 14), (31, 31)])
def test_min_size_is_the_least_height_or_width(min_size, rows):
    processor = VLMImageProcessor(32, min_size=min_size)
    left, top, right, bottom = white_box(processor, (500, 10))
    assert (right - left, bottom - top) == (32, rows)
    assert top == (32 - rows) // 2


@oracle_is_pillow_13
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    width=st.integers(1, 160),
    height=st.integers(1, 160),
    image_size=st.integers(14, 80),
    min_size=st.integers(1, 14),
    mean=st.sampled_from([(0.5, 0.5, 0.5), tuple(CLIP_MEAN)]),
)
def test_resize_is_bit_for_bit_the_plain_computation(width, height, image_size, min_size, mean):
    image = noise((width, height), seed=width * height)
    square = VLMImageProcessor(image_size, min_size=min_size, image_mean=mean).resize(image)
    background = tuple(int(255 * channel) for channel in mean)
    assert square.dtype == np.uint8
    np.testing.assert_array_equal(square, plain_square(image, image_size, min_size, background))


@oracle_is_pillow_13
@pytest.mark.parametrize("name", ["1.3b", "7b"])
@pytest.mark.parametrize("size", [(640, 427), (333, 1000), (50, 37)])
def test_resize_is_bit_for_bit_the_plain_computation_with_the_published_settings(name, size):
    file = PUBLISHED[name]
    square = VLMImageProcessor(**file).resize(noise(size))
    expected = plain_square(noise(size), file["image_size"], file["min_size"], tuple(file["background_color"]))
    np.testing.assert_array_equal(square, expected)


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("L", (9, 6), 200), (200, 200, 200)),
        (Image.new("1", (9, 6), 1), (255, 255, 255)),
        (Image.new("LA", (9, 6), (90, 10)), (90, 90, 90)),
        (Image.new("RGBA", (9, 6), (10, 20, 30, 0)), (10, 20, 30)),  # alpha is dropped, not blended
        (Image.new("CMYK", (9, 6), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGB", (9, 6), (1, 2, 3)).convert("P", palette=Image.Palette.ADAPTIVE), (1, 2, 3)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_other_modes_are_converted_to_rgb(image, colour):
    square = VLMImageProcessor(32).resize(image)
    assert square.shape == (3, 32, 32)
    assert square[:, 16, 16].tolist() == list(colour)
    np.testing.assert_array_equal(square, VLMImageProcessor(32).resize(image.convert("RGB")))


def test_resize_leaves_the_callers_image_as_it_is():
    image = noise((50, 20))
    before = image.tobytes()
    VLMImageProcessor(32).resize(image)
    assert (image.size, image.tobytes()) == ((50, 20), before)


def test_exif_orientation_is_not_the_processors_business(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    noise((40, 20)).save(path, exif=exif, quality=95)
    with Image.open(path) as turned:
        square = VLMImageProcessor(32).resize(turned)
        expected = VLMImageProcessor(32).resize(Image.fromarray(np.asarray(turned)))
    np.testing.assert_array_equal(square, expected)


# expand2square


@pytest.mark.parametrize(
    ("size", "box"), [((7, 2), (0, 2, 7, 4)), ((2, 7), (2, 0, 4, 7)), ((6, 2), (0, 2, 6, 4)), ((1, 4), (1, 0, 2, 4))]
)
def test_expand2square_centres_on_the_background(size, box):
    image = noise(size)
    square = expand2square(image, (9, 8, 7))
    expected = np.full((max(size), max(size), 3), (9, 8, 7), dtype=np.uint8)
    left, top, right, bottom = box
    expected[top:bottom, left:right] = np.asarray(image)
    np.testing.assert_array_equal(np.asarray(square), expected)


def test_expand2square_leaves_a_square_alone():
    image = noise((5, 5))
    np.testing.assert_array_equal(np.asarray(expand2square(image, (0, 0, 0))), np.asarray(image))


# preprocess


@pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
def test_return_tensors(return_tensors):
    images = [noise((20, 10)), noise((10, 20), seed=1)]
    pixels = VLMImageProcessor(32).preprocess(images, return_tensors=return_tensors)["pixel_values"]
    assert type(pixels) is {None: list, "np": np.ndarray, "pt": torch.Tensor}[return_tensors]
    assert len(pixels) == 2
    stacked = np.stack([np.asarray(image) for image in pixels])
    assert (stacked.shape, stacked.dtype) == ((2, 3, 32, 32), np.float32)
    np.testing.assert_array_equal(stacked, VLMImageProcessor(32)(images)["pixel_values"].numpy())


def test_tensors_of_torch_are_the_default():
    pixels = VLMImageProcessor(32).preprocess([noise((20, 10))])["pixel_values"]
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.float32, (1, 3, 32, 32))


@pytest.mark.parametrize(("return_tensors", "shape"), [("np", (0, 3, 32, 32)), ("pt", (0, 3, 32, 32))])
def test_no_images_give_an_empty_batch(return_tensors, shape):
    pixels = VLMImageProcessor(32)([], return_tensors=return_tensors)["pixel_values"]
    assert tuple(pixels.shape) == shape
    assert str(pixels.dtype).removeprefix("torch.") == "float32"


def test_no_images_give_an_empty_list_without_return_tensors():
    assert VLMImageProcessor(32)([], return_tensors=None)["pixel_values"] == []


def test_a_single_image_is_a_batch_of_one():
    image = noise((20, 10))
    single = VLMImageProcessor(32)(image)["pixel_values"]
    assert torch.equal(single, VLMImageProcessor(32)([image])["pixel_values"])
    assert len(single) == 1


@pytest.mark.parametrize("name", ["1.3b", "7b"])
def test_pixels_are_rescaled_and_normalised_only_if_asked(name):
    file = PUBLISHED[name]
    processor = VLMImageProcessor(**{**file, "image_size": 40})
    image = noise((33, 40))
    pixels = processor(image, return_tensors="np")["pixel_values"][0]

    expected = processor.resize(image) / 255
    if file["do_normalize"]:
        expected = (expected - np.reshape(file["image_mean"], (3, 1, 1))) / np.reshape(file["image_std"], (3, 1, 1))
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, expected, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([8, 14, 33]), st.sampled_from(sorted(PUBLISHED)))
def test_pixels_are_bit_for_bit_the_plain_computation(width, height, image_size, name):
    """Includes the background, borders that differ by a pixel, and squares smaller than `min_size`."""
    file = PUBLISHED[name]
    processor = VLMImageProcessor(**{**file, "image_size": image_size})
    image = noise((width, height))
    expected = (processor.resize(image).astype(np.float64) * file["rescale_factor"]).astype(np.float32)
    if file["do_normalize"]:
        mean, std = (np.array(file[key], dtype=np.float32)[:, None, None] for key in ("image_mean", "image_std"))
        expected = (expected - mean) / std
    pixels = processor([image, image], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(pixels, [expected, expected])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"do_normalize": False}, [0.0, 0.2, 1.0]),
        ({"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}, [-1.0, -0.6, 1.0]),
        ({"image_mean": (0.0, 0.2, 0.6), "image_std": (1.0, 0.5, 0.4)}, [0.0, 0.0, 1.0]),
        ({"do_normalize": False, "rescale_factor": 1.0}, [0.0, 51.0, 255.0]),
        ({"do_normalize": False, "rescale_factor": 1 / 51}, [0.0, 1.0, 5.0]),
    ],
)
def test_each_channel_has_its_own_mean_and_deviation(options, expected):
    pixels = VLMImageProcessor(16, **options)(Image.new("RGB", (4, 4), (0, 51, 255)))["pixel_values"]
    torch.testing.assert_close(pixels, torch.tensor(expected).reshape(1, 3, 1, 1).expand(1, 3, 16, 16))


@pytest.mark.parametrize("wrong", ["picture.png", np.zeros((4, 4, 3), dtype=np.uint8)], ids=["path", "array"])
def test_what_is_no_pil_image_is_a_type_error(wrong):
    with pytest.raises(TypeError, match=type(wrong).__name__):
        VLMImageProcessor(32)([wrong])


# Files


@pytest.mark.parametrize("name", ["1.3b", "7b"])
@pytest.mark.parametrize("opener", [VLMImageProcessor, AutoImageProcessor], ids=lambda opener: opener.__name__)
def test_a_published_file_is_read_and_written_back_unchanged(tmp_path, name, opener):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "preprocessor_config.json").write_text(json.dumps(PUBLISHED[name]))
    processor = opener.from_pretrained(tmp_path / "in")
    assert type(processor) is VLMImageProcessor
    for key in ("image_size", "min_size", "rescale_factor", "do_normalize"):
        assert getattr(processor, key) == PUBLISHED[name][key]
    for key in ("image_mean", "image_std", "background_color"):
        assert list(getattr(processor, key)) == PUBLISHED[name][key]

    processor.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == PUBLISHED[name]


@pytest.mark.parametrize("opener", [VLMImageProcessor, AutoImageProcessor], ids=lambda opener: opener.__name__)
@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 32},
        {"image_size": 48, "min_size": 7, "image_mean": (0.1, 0.2, 0.3), "image_std": (0.4, 0.5, 0.6)},
        {"image_size": 32, "image_mean": None, "image_std": None, "do_normalize": False, "rescale_factor": 0.5},
    ],
)
def test_a_saved_processor_gives_the_same_pixels(tmp_path, opener, options):
    processor = VLMImageProcessor(**options)
    processor.save_pretrained(tmp_path)
    loaded = opener.from_pretrained(tmp_path)
    assert type(loaded) is VLMImageProcessor
    with Image.open(make_picture(tmp_path / "picture.png")) as picture:
        assert torch.equal(loaded(picture)["pixel_values"], processor(picture)["pixel_values"])


def test_auto_image_processor_opens_a_whole_checkpoint(checkpoint):
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    assert type(processor) is VLMImageProcessor
    assert processor.image_size in (32, 64)
    assert processor.to_dict() == VLMImageProcessor.from_pretrained(checkpoint).to_dict()

"""PIL image -> `pixel_values`, bit for bit as the reference does it."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import PretrainedConfig
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import load_image

from deepseek_vl.checkpoints.find import FromCheckpoint
from deepseek_vl.checkpoints.layout_configs import images_to_reference
from deepseek_vl.imaging.square import Square, expand2square

IMAGENET_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGENET_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_INCEPTION_MEAN = (0.5, 0.5, 0.5)
IMAGENET_INCEPTION_STD = (0.5, 0.5, 0.5)


def flat_images(images: Any, tags: Sequence[int] = ()) -> list[Any]:
    """A flat list, in reading order, of the images in transformers' `ImageInput`: (nested) lists, one image, or None.

    Images given by path or address are opened.

    Args:
        tags: how many images each of the texts has.

    Raises:
        ValueError: if there is a list of images for each text, and one has more or fewer than its text.
    """
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        groups = [flat_images(item) for item in images]
        if len(groups) == len(tags) and all(isinstance(item, list | tuple) for item in images):
            for number, (group, count) in enumerate(zip(groups, tags, strict=True), 1):
                if len(group) != count:
                    raise ValueError(
                        f"Text {number} has {count} image tags, and {len(group)} images were given for it."
                    )
        return [image for group in groups for image in group]
    if getattr(images, "ndim", 3) == 4:  # an array of images
        return list(images)
    return [load_image(images) if isinstance(images, str) else images]


class VLMImageProcessorConfig(PretrainedConfig):
    """The image processor's settings; the key under which it is registered with `AutoImageProcessor`."""

    model_type = "deepseek_vlm"

    def __init__(
        self,
        image_size: int = 384,
        min_size: int = 14,
        image_mean: Sequence[float] | None = IMAGENET_MEAN,
        image_std: Sequence[float] | None = IMAGENET_STD,
        rescale_factor: float = 1.0 / 255.0,
        do_normalize: bool = True,
        **kwargs: Any,
    ):
        self.image_size = image_size
        self.min_size = min_size
        self.image_mean = image_mean
        self.image_std = image_std
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        super().__init__(**kwargs)


class VLMImageProcessor(FromCheckpoint, BaseImageProcessor):
    """Resizes an image to fit a square, centres it on the mean colour, and scales its pixels.

    Args:
        image_size: side S of the square in pixels.
        min_size: the shorter side is never resized below this.
        image_mean: per channel, for `do_normalize` and for the background; None for no normalisation and a background
            of 127.
        image_std: per channel, for `do_normalize`.
        rescale_factor: multiplies the 8-bit values.
        do_normalize: subtract the mean and divide by the standard deviation.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_size: int,
        min_size: int = 14,
        image_mean: Sequence[float] | None = IMAGENET_MEAN,
        image_std: Sequence[float] | None = IMAGENET_STD,
        rescale_factor: float = 1.0 / 255.0,
        do_normalize: bool = True,
        **kwargs: Any,
    ):
        kwargs.pop("background_color", None)  # files have it, but it follows from the mean
        super().__init__(**kwargs)
        self.image_size = image_size
        self.min_size = min_size
        self.image_mean = image_mean
        self.image_std = image_std
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        red, green, blue = (127, 127, 127) if image_mean is None else (int(255 * m) for m in image_mean)
        self.background_color = (red, green, blue)

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """transformers' hook that reads the settings, which may be in transformers' layout of this model."""
        settings, unused = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        if str(settings.get("image_processor_type", "")).startswith("DeepseekVL"):
            settings = images_to_reference(settings)
        return settings, unused

    @property
    def default_shape(self) -> list[int]:
        """Shape of one processed image: [3, S, S]."""
        return [3, self.image_size, self.image_size]

    @property
    def square(self) -> Square:
        """The square that `resize` puts images on."""
        return Square(self.image_size, self.min_size, self.background_color)

    def resize(self, pil_img: Image.Image) -> np.ndarray:
        """Any PIL image -> uint8 [3, S, S].

        Raises:
            TypeError: if it is not a PIL image.
            ValueError: if it has no pixels.
        """
        square = np.asarray(expand2square(self._fit(pil_img), self.background_color))  # [S, S, 3]
        return np.ascontiguousarray(square.transpose(2, 0, 1))

    def _fit(self, pil_img: Image.Image) -> Image.Image:
        """The image in RGB, its longer side S pixels; raises as `resize`."""
        if not isinstance(pil_img, Image.Image):
            raise TypeError(f"Images must be PIL images, got {type(pil_img).__name__}; load them with load_pil_images.")
        return self.square.resized(pil_img)

    def preprocess(
        self, images: Image.Image | Sequence[Image.Image], return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Images -> `pixel_values`, float32 [n, 3, S, S]: a list of arrays, or one array or tensor.

        Args:
            images: PIL images of any size and mode, or one of them.
            return_tensors: None, "np" or "pt".
        """
        if isinstance(images, Image.Image):
            images = [images]
        table = _value_table(self.rescale_factor, *self._normalisation())
        side = max(self.image_size, self.min_size)
        pixel_values = np.empty((len(images), 3, side, side), dtype=np.float32)
        for square, image in zip(pixel_values, images, strict=True):
            pixels = np.asarray(self._fit(image))  # [h, w, 3]
            height, width = pixels.shape[:2]
            top, left = (side - height) // 2, (side - width) // 2
            within = np.s_[top : top + height, left : left + width]
            for channel, background in enumerate(self.background_color):
                square[channel] = table[channel, background]
                # All indices are valid, so "clip" clips nothing; unlike "raise", it writes to `out` without a buffer.
                np.take(table[channel], pixels[..., channel], out=square[channel][within], mode="clip")
        arrays = pixel_values if return_tensors is not None else list(pixel_values)
        return BatchFeature(data={"pixel_values": arrays}, tensor_type=return_tensors)

    def __call__(self, images: Image.Image | Sequence[Image.Image], *args: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, *args, **kwargs)

    def _normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if not self.do_normalize or self.image_mean is None or self.image_std is None:
            return (0.0,) * 3, (1.0,) * 3
        return tuple(self.image_mean), tuple(self.image_std)

    def to_dict(self) -> dict[str, Any]:
        """The settings, as published `preprocessor_config.json` files have them."""
        return {
            "background_color": list(self.background_color),
            "do_normalize": self.do_normalize,
            "image_mean": None if self.image_mean is None else list(self.image_mean),
            "image_processor_type": type(self).__name__,
            "image_size": self.image_size,
            "image_std": None if self.image_std is None else list(self.image_std),
            "min_size": self.min_size,
            "processor_class": "VLChatProcessor",
            "rescale_factor": self.rescale_factor,
        }


@functools.lru_cache(maxsize=8)
def _value_table(rescale_factor: float, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """float32 [3, 256]: what each 8-bit value becomes in each channel, rounded at the same steps as the reference."""
    values = (np.arange(256, dtype=np.float64) * rescale_factor).astype(np.float32)
    return (values - np.asarray(mean, dtype=np.float32)[:, None]) / np.asarray(std, dtype=np.float32)[:, None]

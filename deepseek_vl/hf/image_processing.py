"""Images -> pixels in transformers' form: normalised, and for the hybrid model in two sizes."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import ImageInput

from deepseek_vl.checkpoints import layout_configs as layouts
from deepseek_vl.checkpoints.find import bundled_or_same, hub_arguments_of
from deepseek_vl.imaging.square import resize_steps
from deepseek_vl.models import VLMImageProcessor
from deepseek_vl.models.image_processing_vlm import IMAGENET_MEAN, IMAGENET_STD, flat_images

_SETTINGS = (
    "size",
    "min_size",
    "image_mean",
    "image_std",
    "rescale_factor",
    "do_normalize",
    "high_res_size",
    "high_res_image_mean",
    "high_res_image_std",
)


class DeepseekVLImageProcessor(BaseImageProcessor):
    """Images -> `pixel_values`, bit for bit as the reference does it, and `high_res_pixel_values` for the hybrid model.

    Args:
        size: `{"height", "width"}` of the low-resolution square.
        min_size: the shorter side is never resized below this.
        image_mean, image_std: per channel, of the low-resolution pixels.
        rescale_factor: multiplies the 8-bit values.
        do_normalize: subtract the mean and divide by the standard deviation.
        high_res_size: of the high-resolution square; None for a model without such a tower. The low-resolution pixels
            are then made from the high-resolution square, as the reference's model makes them.
        high_res_image_mean, high_res_image_std: per channel, of the high-resolution pixels.
    """

    model_input_names = ["pixel_values", "high_res_pixel_values"]

    def __init__(
        self,
        size: dict[str, int] | None = None,
        min_size: int = 14,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        rescale_factor: float = 1.0 / 255.0,
        do_normalize: bool = True,
        high_res_size: dict[str, int] | None = None,
        high_res_image_mean: Sequence[float] = IMAGENET_MEAN,
        high_res_image_std: Sequence[float] = IMAGENET_STD,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.size = size or {"height": 384, "width": 384}
        self.min_size = min_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.high_res_size = high_res_size
        self.high_res_image_mean, self.high_res_image_std = list(high_res_image_mean), list(high_res_image_std)

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """transformers' hook that reads the settings, which may be in the reference's layout."""
        path = bundled_or_same(pretrained_model_name_or_path)
        settings, unused = super().get_image_processor_dict(path, **kwargs)
        if settings.get("image_processor_type") == VLMImageProcessor.__name__:
            from deepseek_vl.models import MultiModalityConfig

            hub_arguments = hub_arguments_of(kwargs)
            config, _ = MultiModalityConfig.get_config_dict(path, **hub_arguments)
            settings = layouts.images_to_transformers(settings, config)
        return settings, unused

    def preprocess(self, images: ImageInput, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Images -> float32 `pixel_values` [n, 3, s, s], and for the hybrid `high_res_pixel_values` [n, 3, S, S].

        Args:
            images: PIL images, uint8 arrays or tensors ([H, W, 3] or [3, H, W], or batches of them), paths, addresses
                or base64 text; one or (nested) lists of them.
            return_tensors: "np" or "pt".
            kwargs: settings for this call alone (`size`, `do_normalize`, `image_mean`, ...), and for the fast processor
                `device`: where to work, None for where the images are.

        Raises:
            ValueError: without images, or for arrays that are none.
        """
        device = kwargs.pop("device", None)
        settings = {name: value for name, value in kwargs.items() if name in _SETTINGS and value is not None}
        processor = copy.copy(self)
        vars(processor).update(settings)
        flat = flat_images(images)
        if not flat:
            raise ValueError("There are no images.")
        return BatchFeature(processor._pixels(processor._squares(flat, device)), tensor_type=return_tensors)

    def _squares(self, images: Sequence[Any], device: torch.device | str | None) -> torch.Tensor:
        """Images, resized and padded: uint8 [n, 3, S, S], on the device if one is given."""
        size = (self.high_res_size or self.size)["height"]
        mean = self.high_res_image_mean if self.high_res_size else self.image_mean
        exact = VLMImageProcessor(size, self.min_size, image_mean=mean)
        return torch.from_numpy(np.stack([exact.resize(_as_pil(image)) for image in images])).to(device)

    def _pixels(self, squares: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 [n, 3, S, S] -> the model's inputs."""
        # Rounded at the same steps as the reference.
        values = torch.arange(256, dtype=torch.float64) * self.rescale_factor
        pixels = values.float().to(squares.device)[squares.long()]
        if self.high_res_size is None:
            return {"pixel_values": self._normalised(pixels, self.image_mean, self.image_std)}
        side = (self.size["height"],) * 2
        low = F.interpolate(pixels, size=side, mode="bilinear", antialias=True)
        return {
            "pixel_values": self._normalised(low, self.image_mean, self.image_std),
            "high_res_pixel_values": self._normalised(pixels, self.high_res_image_mean, self.high_res_image_std),
        }

    def _normalised(self, pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
        if not self.do_normalize:
            return pixels
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (mean, std))
        return (pixels - mean) / std

    def to_dict(self) -> dict[str, Any]:
        """The settings, as transformers' own class writes them."""
        names = ("do_normalize", "image_mean", "image_std", "min_size", "rescale_factor", "size")
        prefix = "Hybrid" if self.high_res_size else ""
        if self.high_res_size:
            names += ("high_res_image_mean", "high_res_image_std", "high_res_size")
        return {
            **{name: getattr(self, name) for name in names},
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_processor_type": f"DeepseekVL{prefix}ImageProcessor",
            "processor_class": f"DeepseekVL{prefix}Processor",
            "resample": 3,
        }


class DeepseekVLImageProcessorFast(DeepseekVLImageProcessor):
    """The same on tensors, in batches, where they are: on a GPU too.

    The squares are Pillow's bit for bit, because they are made with its rounded weights. What is computed from them on
    another device, the hybrid's low-resolution pixels and the normalisation, may differ in the last bits of a float.
    """

    def _squares(self, images: Sequence[Any], device: torch.device | str | None) -> torch.Tensor:
        """Images of any sizes -> uint8 [n, 3, S, S]; those of one size together."""
        images = [_as_tensor(image).to(device) for image in images]
        side = (self.high_res_size or self.size)["height"]
        mean = self.high_res_image_mean if self.high_res_size else self.image_mean
        background = torch.tensor([int(255 * value) for value in mean], dtype=torch.uint8)
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(tuple(image.shape[1:]), []).append(index)
        squares = background[None, :, None, None].repeat(len(images), 1, side, side).to(images[0].device)
        for (height, width), indexes in groups.items():
            longest = max(height, width)
            size = [max(int(length / longest * side), self.min_size) for length in (height, width)]
            batch = torch.stack([images[index] for index in indexes])
            for new_width, new_height in resize_steps((width, height), (size[1], size[0])):
                if batch.shape[3] != new_width:
                    batch = _resize_rows(batch, new_width)
                if batch.shape[2] != new_height:
                    batch = _resize_rows(batch.mT, new_height).mT
            top, left = ((max(size) - length) // 2 for length in size)
            squares[indexes, :, top : top + size[0], left : left + size[1]] = batch
        return squares


def _resize_rows(batch: torch.Tensor, width: int) -> torch.Tensor:
    """Pillow's bicubic resize along the last axis: uint8 [..., W] -> uint8 [..., width]."""
    # Sums of whole numbers below 2^53 are exact in float64, which Apple's GPUs do not have.
    pixels = batch.to("cpu" if batch.device.type == "mps" else batch.device, torch.float64)
    sums = [
        pixels[..., first : first + len(weights)] @ torch.from_numpy(weights).to(pixels.device)
        for first, weights in _bicubic_weights(batch.shape[-1], width)
    ]
    return ((torch.cat(sums, dim=-1) + _ONE / 2) / _ONE).floor().clamp(0, 255).to(batch.device, torch.uint8)


_ONE = 2**22
"""Pillow's weights for 8-bit pixels are whole multiples of one in so many."""


def _bicubic_weights(old: int, new: int) -> Iterator[tuple[int, np.ndarray]]:
    """Pillow's weights, antialiased, in units of 1 / `_ONE`.

    Yields:
        For every 32 of the `new` pixels: the first of the `old` pixels in them, and its weights and those of the next
        ones, float64 [pixels, 32].
    """
    scale = old / new
    stretch = max(scale, 1.0)  # of the filter, when the picture shrinks
    centres = (np.arange(new) + 0.5) * scale
    firsts = np.maximum((centres - 2 * stretch + 0.5).astype(int), 0)
    lasts = np.minimum((centres + 2 * stretch + 0.5).astype(int), old)
    for block in (slice(start, start + 32) for start in range(0, new, 32)):
        first, last, centre = firsts[block], lasts[block], centres[block]
        pixel = np.arange(first[0], last[-1])[:, None]
        x = np.abs((pixel - centre + 0.5) * (1 / stretch))
        near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0)) * ((pixel >= first) & (pixel < last))
        weights = weights / weights.sum(axis=0) * _ONE
        yield int(first[0]), np.trunc(weights + np.copysign(0.5, weights))


def _as_pil(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(_as_tensor(image).permute(1, 2, 0).cpu().numpy())


def _as_tensor(image: Any) -> torch.Tensor:
    """uint8 [3, H, W].

    Raises:
        ValueError: for another kind of array.
    """
    if isinstance(image, Image.Image):
        return torch.tensor(np.asarray(image.convert("RGB"))).permute(2, 0, 1)
    tensor = image if isinstance(image, torch.Tensor) else torch.tensor(np.asarray(image))
    if tensor.dtype != torch.uint8 or tensor.ndim != 3 or 3 not in (tensor.shape[0], tensor.shape[2]):
        raise ValueError(
            f"Images must be PIL images, or uint8 arrays of shape [H, W, 3] or [3, H, W]; got {tensor.dtype} of shape "
            f"{list(tensor.shape)}."
        )
    return tensor.permute(2, 0, 1) if tensor.shape[2] == 3 else tensor

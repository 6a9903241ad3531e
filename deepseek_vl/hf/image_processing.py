"""Images -> pixels as transformers' models take them: normalised, and for the hybrid model in two sizes."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import ImageInput

from deepseek_vl.checkpoints import layout_configs as layouts
from deepseek_vl.checkpoints.find import FromCheckpoint
from deepseek_vl.models import MultiModalityConfig, VLMImageProcessor
from deepseek_vl.models.image_processing_vlm import IMAGENET_MEAN, IMAGENET_STD, flat_images


class DeepseekVLImageProcessor(FromCheckpoint, BaseImageProcessor):
    """Images -> `pixel_values`, bit for bit as the reference does it, and `high_res_pixel_values` for the hybrid model.

    Args:
        size: `{"height", "width"}` of the low-resolution square.
        min_size: the shorter side is never resized below this.
        image_mean: per channel, of the low-resolution pixels.
        image_std: per channel, of the low-resolution pixels.
        rescale_factor: multiplies the 8-bit values.
        do_normalize: subtract the mean and divide by the standard deviation.
        high_res_size: of the high-resolution square; None for a model without such a tower. The low-resolution pixels
            are then made from the high-resolution square, as the reference's model makes them.
        high_res_image_mean: per channel, of the high-resolution pixels.
        high_res_image_std: per channel, of the high-resolution pixels.
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
        settings, unused = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        if settings.get("image_processor_type") == VLMImageProcessor.__name__:
            config, _ = MultiModalityConfig.get_config_dict(pretrained_model_name_or_path)
            settings = layouts.images_to_transformers(settings, config)
        return settings, unused

    def preprocess(
        self,
        images: ImageInput,
        return_tensors: str | None = "pt",
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Images -> float32 `pixel_values` [n, 3, s, s], and for the hybrid `high_res_pixel_values` [n, 3, S, S].

        Args:
            images: PIL images, uint8 arrays or tensors ([H, W, 3] or [3, H, W], or batches of them), paths, addresses
                or base64 text; one or (nested) lists of them.
            return_tensors: "np" or "pt".
            device: the device of the pixels; None for the CPU.
            kwargs: settings for this call alone (`size`, `do_normalize`, `image_mean`, ...).

        Raises:
            ValueError: without images, or for arrays that are not images.
        """
        processor = copy.copy(self)
        vars(processor).update({k: v for k, v in kwargs.items() if k in vars(self) and v is not None})
        flat = flat_images(images)
        if not flat:
            raise ValueError("There are no images.")
        return BatchFeature(processor._pixels(flat, device), tensor_type=return_tensors)

    def _pixels(self, images: Sequence[Any], device: torch.device | str | None) -> dict[str, torch.Tensor]:
        """Images -> the model's inputs."""
        side = (self.high_res_size or self.size)["height"]
        mean = self.high_res_image_mean if self.high_res_size else self.image_mean
        exact = VLMImageProcessor(
            side, self.min_size, image_mean=mean, rescale_factor=self.rescale_factor, do_normalize=False
        )
        pixels = exact([_as_pil(image) for image in images])["pixel_values"].to(device)
        if self.high_res_size is None:
            return {"pixel_values": self._normalised(pixels, self.image_mean, self.image_std)}
        low = F.interpolate(pixels, size=(self.size["height"],) * 2, mode="bilinear", antialias=True)
        return {
            "pixel_values": self._normalised(low, self.image_mean, self.image_std),
            "high_res_pixel_values": self._normalised(pixels, self.high_res_image_mean, self.high_res_image_std),
        }

    def _normalised(self, pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
        if not self.do_normalize:
            return pixels
        shift, scale = (pixels.new_tensor(values)[:, None, None] for values in (mean, std))
        return (pixels - shift) / scale

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
    """`DeepseekVLImageProcessor` whose pixels are on the device of the images, if these are tensors, or on `device`.

    Pillow still resizes on the CPU. The hybrid's low-resolution pixels and the normalisation, if computed on another
    device, may differ in the last bits of a float.
    """

    def _pixels(self, images: Sequence[Any], device: torch.device | str | None) -> dict[str, torch.Tensor]:
        if device is None and isinstance(images[0], torch.Tensor):
            device = images[0].device
        return super()._pixels(images, device)


def _as_pil(image: Any) -> Image.Image:
    """The image that a uint8 array or tensor holds.

    Raises:
        ValueError: for another kind of array.
    """
    if isinstance(image, Image.Image):
        return image
    array = image.cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]):
        raise ValueError(
            f"Images must be PIL images, or uint8 arrays of shape [H, W, 3] or [3, H, W]; got {array.dtype} of shape "
            f"{list(array.shape)}."
        )
    return Image.fromarray(array if array.shape[2] == 3 else rearrange(array, "c h w -> h w c"))

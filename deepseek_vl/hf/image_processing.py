"""Images -> pixels in transformers' form: normalised, and for the hybrid model in two sizes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import ImageInput

from deepseek_vl.bundled import bundled_or_same
from deepseek_vl.models import VLMImageProcessor
from deepseek_vl.models import layout_configs as layouts
from deepseek_vl.models.checkpoint import hub_arguments_of
from deepseek_vl.models.image_processing_vlm import IMAGENET_MEAN, IMAGENET_STD, flat_images, resize_steps


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
        """
        flat = [_as_pil(image) for image in flat_images(images)]
        if not flat:
            raise ValueError("There are no images.")
        return BatchFeature(self._pixels(self._squares(flat)), tensor_type=return_tensors)

    def _squares(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Images, resized and padded: uint8 [n, 3, S, S]."""
        size = (self.high_res_size or self.size)["height"]
        mean = self.high_res_image_mean if self.high_res_size else self.image_mean
        exact = VLMImageProcessor(size, self.min_size, image_mean=mean)
        return torch.from_numpy(np.stack([exact.resize(image) for image in images]))

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

    torch's antialiased bicubic resize has exact weights and Pillow's are rounded, so that a pixel of a photograph may
    differ from the exact one by 1/255, and one of noise by 2/255. Loading a checkpoint's processor gives the exact one
    unless this class is asked.
    """

    def preprocess(
        self,
        images: ImageInput,
        return_tensors: str | None = "pt",
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """As `DeepseekVLImageProcessor.preprocess`.

        Args:
            device: where to work; None for where the images are.
        """
        tensors = [_as_tensor(image) for image in flat_images(images)]
        if not tensors:
            raise ValueError("There are no images.")
        if device is not None:
            tensors = [tensor.to(device) for tensor in tensors]
        return BatchFeature(self._pixels(self._square_tensors(tensors)), tensor_type=return_tensors)

    def _square_tensors(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """uint8 [3, H, W] of any sizes -> uint8 [n, 3, S, S]; those of one size together."""
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
                if batch.shape[3] == 1:  # torch takes wrong weights for a single column
                    batch = batch.expand(-1, -1, -1, 4)
                step = (new_height, 4 if new_width == 1 else new_width)
                if tuple(batch.shape[2:]) != step:  # one axis at a time, rounding in between, as Pillow does
                    resized = F.interpolate(batch.float(), size=step, mode="bicubic", antialias=True)
                    batch = resized.round().clamp(0, 255)
            top, left = ((max(size) - length) // 2 for length in size)
            squares[indexes, :, top : top + size[0], left : left + size[1]] = batch.byte()
        return squares


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

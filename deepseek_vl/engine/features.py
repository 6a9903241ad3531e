"""Pictures as vectors, for finding similar ones: what the vision tower sees, pooled to one vector a picture."""

import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import nn

from deepseek_vl.engine.engine import IMAGES_AT_A_TIME
from deepseek_vl.imaging.open import load_image
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.models.modeling_vlm import like_parameters

Pooling = Literal["mean", "attention"]


def embed_images(
    model: MultiModalityCausalLM,
    processor: VLChatProcessor,
    images: Iterable[Any],
    pooling: Pooling = "mean",
    batch_size: int | None = None,
    open_image: Callable[[Any], Image.Image] = load_image,
) -> torch.Tensor:
    """One vector per picture: the features of the vision tower, before the projector, pooled over all patches.

    Compare vectors by their cosine (`torch.nn.functional.normalize`, then a product). Only one batch of pictures is
    open at a time.

    For the hybrid tower, "mean" concatenates the means of SAM's and SigLIP's features, and "attention" pools SigLIP's
    alone, as SAM has no such head.

    Args:
        images: what `open_image` takes: by default paths, bytes, files or PIL images; may be a generator, or one path
            or PIL image.
        pooling: "mean", or "attention" for SigLIP's pooling head. Published checkpoints carry the head as it was
            pretrained: DeepSeek-VL trains the tower below it, but neither runs nor trains the head.
        batch_size: pictures that run through the tower together; None for 4, or for 1 on CPUs.
        open_image: opens one of them.

    Returns:
        float32 [n, D] on the CPU, not normalised. D is the tower's width, 1024 for the published models, or the sum of
        both for the mean of a hybrid.

    Raises:
        ValueError: for an unknown pooling, "attention" with a tower that has no such head, or without pictures.
        ImageLoadError: for a picture that cannot be read.
    """
    if pooling not in get_args(Pooling):
        raise ValueError(f"Unknown pooling {pooling!r}; known are {', '.join(get_args(Pooling))}.")
    if isinstance(images, str | bytes | os.PathLike | Image.Image):
        images = [images]
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    pool = _mean if pooling == "mean" else _by_head(model)
    if batch_size is None:
        batch_size = 1 if model.device.type == "cpu" else IMAGES_AT_A_TIME
    vectors, images = [], iter(images)
    while batch := [open_image(image) for image in itertools.islice(images, batch_size)]:
        pixels = processor.image_processor(batch, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():  # as the engine does: code compiled for it is not compiled anew
            features = model.vision_model(like_parameters(pixels, model.vision_model))
            vectors.append(pool(features if isinstance(features, tuple) else (features,)).float().cpu())
    if not vectors:
        raise ValueError("There are no pictures to embed.")
    return torch.cat(vectors)


def _mean(features: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[B, N, width] of each tower -> [B, D]."""
    return torch.cat([each.float().mean(dim=1) for each in features], dim=-1)


def _by_head(model: MultiModalityCausalLM) -> Callable[[tuple[torch.Tensor, ...]], torch.Tensor]:
    """A function that pools the last tower's features (SigLIP's) with SigLIP's own pooling head."""
    vision: nn.Module = model.vision_model
    tower: Any = getattr(vision, "vision_tower_low", vision).vision_tower
    if getattr(tower, "attn_pool", None) is None or getattr(vision, "concat_type", "tuple") != "tuple":
        raise ValueError('pooling="attention" needs a SigLIP tower whose features stand alone; use "mean".')
    return lambda features: tower.forward_head(features[-1], pre_logits=True)

"""Pretraining of the vision tower by segmentation: it learns from nothing to say what each part of a picture shows.

The published models start from towers that others trained on millions of pictures. No such tower is as small as this
one. Questions and answers alone teach letters very slowly; a segmentation map teaches something about every patch.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from deepseek_vl.models.image_processing_vlm import VLMImageProcessor
from deepseek_vl.models.siglip_vit import SigLIPVisionTransformer
from recipes.tiny.world.maps import CHANNELS, sample_grid

CELLS = 2
"""A patch is divided into this many by this many cells, each with its own answer."""

BACKGROUND_WEIGHT = 0.2
"""The weight, in the loss, of cells that show nothing, which are most of them."""


class SegmentationModel(nn.Module):
    """A vision tower with a linear layer that names thing, colour and number in every cell of a map.

    Args:
        tower: trained in place; its pooling head, which is not used, stays frozen.
    """

    def __init__(self, tower: SigLIPVisionTransformer):
        super().__init__()
        self.tower = tower
        self.tower.attn_pool.requires_grad_(False)
        self.head = nn.Linear(tower.embed_dim, CELLS**2 * sum(CHANNELS))

    @property
    def side(self) -> int:
        """Cells along each side of a picture."""
        return CELLS * self.tower.patch_embed.grid_size[0]

    def forward(self, images: torch.Tensor, cells: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Predict what each cell of pictures shows.

        Args:
            images: pixel values [B, 3, S, S].
            cells: int64 [B, side, side, 3], as `sample_grid` gives them.

        Returns:
            `logits` float32 [B, side, side, sum(CHANNELS)] and, if there are `cells`, `loss`.
        """
        grid = self.side // CELLS
        logits = self.head(self.tower(images)).float()
        logits = logits.view(len(images), grid, grid, CELLS, CELLS, -1).transpose(2, 3)
        logits = logits.reshape(len(images), self.side, self.side, -1)
        if cells is None:
            return {"logits": logits}
        things, colours, numbers = logits.split(CHANNELS, -1)
        thing, colour, number = cells.unbind(-1)
        weight = torch.ones(CHANNELS[0], device=logits.device)
        weight[0] = BACKGROUND_WEIGHT
        shown = thing > 0
        loss = F.cross_entropy(things.flatten(0, -2), thing.flatten(), weight)
        for values, target in ((colours, colour), (numbers, number)):
            # A sum, because the mean over no cells would be undefined.
            loss = loss + F.cross_entropy(values[shown], target[shown], reduction="sum") / (2 * shown.sum().clamp(1))
        return {"loss": loss, "logits": logits}


class SegmentationCollator:
    """Makes batches for `SegmentationModel` of pictures with their maps.

    Args:
        image_processor: makes the pixel values.
        side: cells along each side.
    """

    def __init__(self, image_processor: VLMImageProcessor, side: int):
        self.image_processor = image_processor
        self.side = side

    def __call__(self, pairs: Sequence[tuple[Image.Image, Image.Image]]) -> dict[str, torch.Tensor]:
        """`images` float32 [B, 3, S, S] and `cells` int64 [B, side, side, 3]."""
        pictures, maps = zip(*pairs, strict=True)
        return {
            "images": self.image_processor(list(pictures), return_tensors="pt")["pixel_values"],
            "cells": torch.stack([sample_grid(image, self.side) for image in maps]),
        }

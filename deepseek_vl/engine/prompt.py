"""A processed conversation in the engine's form: without padding, and with images identified by their pixels."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import Any

import numpy as np
import torch

from deepseek_vl.models.modeling_vlm import check_images

FEATURE_IDS = 1 << 62
"""In `Prompt.content`, numbers from here on stand for image features, and smaller ones for tokens."""


@dataclass(frozen=True)
class PromptImage:
    """An image of a prompt.

    Attributes:
        pixels: [3, S, S], as they go into the vision tower.
        key: a hash of them, their dtype and their shape.
    """

    pixels: torch.Tensor
    key: bytes

    @classmethod
    def of(cls, pixels: torch.Tensor) -> "PromptImage":
        """The image with these pixels."""
        # SHA-256 is the fastest of hashlib's on processors that have instructions for it.
        key = hashlib.sha256(f"{pixels.dtype} {tuple(pixels.shape)}".encode())
        key.update(pixels.contiguous().cpu().view(torch.uint8).numpy())
        return cls(pixels, key.digest())


@dataclass(frozen=True)
class Prompt:
    """One conversation, or the end of one, of T tokens, with n images of N features each.

    All tensors but the pixels are on the CPU, where they are counted and compared.

    Attributes:
        input_ids: int64 [T].
        images_seq_mask: bool [T], where an image feature replaces the token's embedding.
        images_emb_mask: bool [n, N], the features that do so, in order; at least one of each image.
        images: n of them.
    """

    input_ids: torch.Tensor
    images_seq_mask: torch.Tensor
    images_emb_mask: torch.Tensor
    images: tuple[PromptImage, ...]

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> "Prompt":
        """The prompt in a processor's output of one row.

        Raises:
            ValueError: if its masks and images do not fit together.
        """
        check_images(inputs["pixel_values"], inputs["images_seq_mask"], inputs["images_emb_mask"])
        token_ids, is_feature, features, is_token = (
            inputs[name][0].cpu() for name in ("input_ids", "images_seq_mask", "images_emb_mask", "attention_mask")
        )
        slots = features.any(-1).nonzero().flatten().tolist()
        images = tuple(PromptImage.of(inputs["pixel_values"][0, slot]) for slot in slots)
        return cls(token_ids, is_feature, features[slots], images)._where(is_token.bool())

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.input_ids)

    def part(self, start: int, end: int) -> "Prompt":
        """The positions from `start` to `end`, with the images that have features there."""
        positions = torch.arange(len(self))
        return self._where((positions >= start) & (positions < end))

    def _where(self, wanted: torch.Tensor) -> "Prompt":
        """The part of the prompt at the positions where `wanted`, bool [T], is true."""
        features = self.images_emb_mask.clone()
        features[self.images_emb_mask] = wanted[self.images_seq_mask]
        used = features.any(-1)
        images = tuple(compress(self.images, used.tolist()))
        return Prompt(self.input_ids[wanted], self.images_seq_mask[wanted], features[used], images)

    @cached_property
    def content(self) -> np.ndarray:
        """int64 [T]: what stands at each position, a token's id or a number for a feature of an image.

        Prompts that begin with the same content have the same embeddings there.
        """
        content = self.input_ids.numpy().copy()
        firsts = [FEATURE_IDS + (int.from_bytes(image.key[:8]) >> 3) for image in self.images]
        features = np.array(firsts, dtype=np.int64)[:, None] + np.arange(self.images_emb_mask.shape[1])  # [n, N]
        content[self.images_seq_mask.numpy()] = features[self.images_emb_mask.numpy()]
        return content

    def arguments(self, device: torch.device) -> dict[str, torch.Tensor | None]:
        """The arguments of `prepare_inputs_embeds` on a device, as a batch of one, without the pixels."""
        return {
            "input_ids": self.input_ids[None].to(device),
            "pixel_values": None,
            "images_seq_mask": self.images_seq_mask[None].to(device),
            "images_emb_mask": self.images_emb_mask[None].to(device),
        }

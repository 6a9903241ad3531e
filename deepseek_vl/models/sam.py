"""The high-resolution tower: Segment Anything's image encoder (arXiv 2304.02643) with DeepSeek-VL's second neck.

A ViT with windowed attention except in a few global blocks, decomposed relative positions (ViTDet, arXiv 2203.16527),
and a convolutional neck. DeepSeek-VL resizes the neck's output to four times the low-resolution tower's grid, and
reduces it to that grid with two stride-2 convolutions. The output of the first global block is processed in the same
way after a neck of its own, scaled by a learnt factor, and added.
"""

import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepseek_vl.checkpoints.read import load_tower_checkpoint
from deepseek_vl.kernels.positions import attend_with_positions
from deepseek_vl.models.variants import select_variant


@dataclass(frozen=True)
class SAMVariant:
    """One row of the table of published SAM encoders; sizes in pixels, channels and counts.

    `neck_size` is the side of the grid to which the neck's output is resized.
    """

    width: int
    layers: int
    heads: int
    global_attn_indexes: tuple[int, ...]
    downsample_channels: tuple[int, ...] = ()
    image_size: int = 1024
    patch_size: int = 16
    window_size: int = 14
    mlp_ratio: float = 4.0
    prompt_embed_dim: int = 256
    neck_size: int = 96


SAM_VARIANTS = {
    "sam_vit_b": SAMVariant(width=768, layers=12, heads=12, global_attn_indexes=(2, 5, 8, 11)),
    "sam_b_downsample": SAMVariant(
        width=768, layers=12, heads=12, global_attn_indexes=(2, 5, 8, 11), downsample_channels=(512, 1024)
    ),
    "sam_vit_l": SAMVariant(width=1024, layers=24, heads=16, global_attn_indexes=(5, 11, 17, 23)),
    "sam_vit_h": SAMVariant(width=1280, layers=32, heads=16, global_attn_indexes=(7, 15, 23, 31)),
}


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rearrange(super().forward(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")


class Attention(nn.Module):
    """Multi-head attention on a `side` x `side` grid with decomposed relative positions.

    A query at (y, x) adds q.R_h[y - y'] + q.R_w[x - x'] to its logit for the key at (y', x'), with q unscaled. The two
    terms are computed once per query and key row or column, so that no [N, N] bias for all heads is in memory.
    """

    def __init__(self, width: int, heads: int, side: int):
        super().__init__()
        self.heads, self.side = heads, side
        self.head_dim = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, self.head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, self.head_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, side, side, width] -> the same shape."""
        q, k, v = rearrange(self.qkv(x), "b h w (qkv heads c) -> qkv b heads (h w) c", qkv=3, heads=self.heads)

        coords = torch.arange(self.side, device=x.device)
        offsets = coords[:, None] - coords[None, :] + self.side - 1  # [query, key] -> row of the position tables
        grid_q = rearrange(q, "b heads (h w) c -> b heads h w c", h=self.side)
        rel_h = torch.einsum("bnhwc,hkc->bnhwk", grid_q, self.rel_pos_h[offsets]).flatten(2, 3)  # [B, heads, N, side]
        rel_w = torch.einsum("bnhwc,wkc->bnhwk", grid_q, self.rel_pos_w[offsets]).flatten(2, 3)

        out = attend_with_positions(q, k, v, rel_h, rel_w)  # [B, heads, N, head_dim]
        return self.proj(rearrange(out, "b heads (h w) c -> b h w (heads c)", h=self.side))


class SAMBlock(nn.Module):
    """Pre-norm transformer block; `window_size` 0 attends globally over the `grid` x `grid` map."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, window_size: int, grid: int):
        super().__init__()
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, side=window_size or grid)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        hidden = int(width * mlp_ratio)
        layers = {"lin1": nn.Linear(width, hidden), "act": nn.GELU(), "lin2": nn.Linear(hidden, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))  # named as in SAM's checkpoints

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, grid, grid, width] -> the same shape."""
        normed = self.norm1(x)
        if self.window_size:
            attended = from_windows(self.attn(to_windows(normed, self.window_size)), *x.shape[1:3])
        else:
            attended = self.attn(normed)
        x = x + attended
        return x + self.mlp(self.norm2(x))


def to_windows(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B, H, W, C] -> [B * windows, size, size, C], padded with zeros at the bottom and right to whole windows."""
    padded = F.pad(x, (0, 0, 0, -x.shape[2] % size, 0, -x.shape[1] % size))
    return rearrange(padded, "b (rows h) (columns w) c -> (b rows columns) h w c", h=size, w=size)


def from_windows(windows: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """The inverse of `to_windows`: [B * windows, size, size, C] -> [B, H, W, C]."""
    rows, columns = -(-H // windows.shape[1]), -(-W // windows.shape[1])
    pattern = "(b rows columns) h w c -> b (rows h) (columns w) c"
    return rearrange(windows, pattern, rows=rows, columns=columns)[:, :H, :W]


def make_neck(width: int, channels: int) -> nn.Sequential:
    """[B, width, H, W] -> [B, channels, H, W]."""
    return nn.Sequential(
        nn.Conv2d(width, channels, kernel_size=1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(channels),
    )


class SAMVisionTransformer(nn.Module):
    """SAM's image encoder with DeepSeek-VL's two necks.

    Raises:
        ValueError: if no block is global, so that the second neck has nothing to read.
    """

    def __init__(self, variant: SAMVariant):
        super().__init__()
        self.variant = variant
        self.image_size = variant.image_size
        self.neck_size = variant.neck_size
        grid = variant.image_size // variant.patch_size
        global_blocks = [i for i in range(variant.layers) if i in variant.global_attn_indexes]
        if not global_blocks:
            raise ValueError(
                f"None of global_attn_indexes {tuple(variant.global_attn_indexes)} is one of {variant.layers} layers."
            )
        self.first_global_block = global_blocks[0]

        project = nn.Conv2d(3, variant.width, kernel_size=variant.patch_size, stride=variant.patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=project, to_grid=Rearrange("b c h w -> b h w c")))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, variant.width))
        self.blocks = nn.ModuleList(
            SAMBlock(
                variant.width,
                variant.heads,
                variant.mlp_ratio,
                window_size=0 if i in global_blocks else variant.window_size,
                grid=grid,
            )
            for i in range(variant.layers)
        )
        self.neck = make_neck(variant.width, variant.prompt_embed_dim)
        channels = (variant.prompt_embed_dim, *variant.downsample_channels)
        self.downsamples = nn.Sequential(
            *(
                nn.Conv2d(c_in, c_out, kernel_size=3, stride=2, padding=1, bias=False)
                for c_in, c_out in itertools.pairwise(channels)
            )
        )
        self.neck_hd = make_neck(variant.width, variant.prompt_embed_dim)
        self.hd_alpha_downsamples = nn.Parameter(torch.zeros(1))
        self.gradient_checkpointing = False  # set by transformers

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] with S = image_size -> [B, C, h, h].

        h is `neck_size`, halved by each downsampling convolution; C is the last one's channels, or the neck's.

        Raises:
            ValueError: if the images have another size.
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"The SAM tower takes {self.image_size}x{self.image_size} images, got {tuple(images.shape[-2:])}."
            )
        x = self.patch_embed(images) + self.pos_embed  # [B, grid, grid, width]
        for i, block in enumerate(self.blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if i == self.first_global_block:
                first_global = x
        return (
            self._to_low_grid(self.neck, x) + self._to_low_grid(self.neck_hd, first_global) * self.hd_alpha_downsamples
        )

    def _to_low_grid(self, neck: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        """[B, grid, grid, width] -> [B, C, h, h]: a neck, the resize in float32, and the shared downsampling."""
        x = neck(rearrange(x, "b h w c -> b c h w"))
        resized = F.interpolate(x.float(), size=(self.neck_size, self.neck_size), mode="bilinear", align_corners=False)
        return self.downsamples(resized.to(x.dtype))


def create_sam_vit(
    model_name: str = "sam_b_downsample", image_size: int = 1024, ckpt_path: str = "", **overrides: Any
) -> SAMVisionTransformer:
    """Build a SAM tower (reference: `create_sam_vit`).

    Args:
        model_name: a row of `SAM_VARIANTS`.
        image_size: side of the square input in pixels.
        ckpt_path: optional weights file for this tower alone; keys may carry SAM's own `image_encoder.` prefix.
        overrides: fields of `SAMVariant` that replace the row's.

    Raises:
        ValueError: for an unknown name or override.
    """
    tower = SAMVisionTransformer(select_variant(SAM_VARIANTS, model_name, image_size=image_size, **overrides))
    load_tower_checkpoint(tower, ckpt_path, prefix="image_encoder.")
    return tower

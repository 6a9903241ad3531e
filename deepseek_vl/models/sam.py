"""The high-resolution tower: Segment Anything's image encoder (arXiv 2304.02643) with DeepSeek-VL's second neck.

A ViT with windowed attention except in a few global blocks, decomposed relative positions (ViTDet, arXiv 2203.16527),
and a convolutional neck. DeepSeek-VL resizes the neck's output to four times the low-resolution tower's grid and brings
it to that grid with two stride-2 convolutions. The output of the first global block takes the same way through a neck
of its own and is added, scaled by a learnt factor.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepseek_vl.checkpoints.read import load_tower_checkpoint
from deepseek_vl.models.variants import select_variant


@dataclass(frozen=True)
class SAMVariant:
    """One row of the table of published SAM encoders; sizes in pixels, channels and counts.

    `neck_size` is the side of the grid to which the neck's output is resized. The four necks' fields are named as in
    the reference where it has a name for them.
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
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Non-overlapping patches: [B, 3, S, S] -> [B, S / patch_size, S / patch_size, width]."""

    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).permute(0, 2, 3, 1)


class MLPBlock(nn.Module):
    """Linear, GELU, Linear; the layers are named as in SAM's checkpoints."""

    def __init__(self, width: int, hidden_width: int):
        super().__init__()
        self.lin1 = nn.Linear(width, hidden_width)
        self.lin2 = nn.Linear(hidden_width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class Attention(nn.Module):
    """Multi-head attention on a `side` x `side` grid with decomposed relative positions.

    A query at (y, x) adds q.R_h[y - y'] + q.R_w[x - x'] to its logit for the key at (y', x'), with q unscaled. The two
    terms are computed once per query and key row or column; no [N, N] bias for all heads is ever in memory.
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
        B, H, W, C = x.shape
        N, heads, head_dim = H * W, self.heads, self.head_dim

        q, k, v = self.qkv(x).reshape(B, N, 3, heads, head_dim).permute(2, 0, 3, 1, 4)  # each [B, heads, N, head_dim]

        coords = torch.arange(self.side, device=x.device)
        offsets = coords[:, None] - coords[None, :] + self.side - 1  # [query, key] -> row of the position tables
        grid_q = q.reshape(B, heads, H, W, head_dim)
        rel_h = torch.einsum("bnhwc,hkc->bnhwk", grid_q, self.rel_pos_h[offsets]).reshape(B, heads, N, H)
        rel_w = torch.einsum("bnhwc,wkc->bnhwk", grid_q, self.rel_pos_w[offsets]).reshape(B, heads, N, W)

        attend = attend_with_bias if x.device.type == "cpu" and not rel_h.requires_grad else attend_widened
        out = attend(q, k, v, rel_h, rel_w)  # [B, heads, N, head_dim]
        return self.proj(out.transpose(1, 2).reshape(B, H, W, C))


def attend_widened(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_h: torch.Tensor, rel_w: torch.Tensor
) -> torch.Tensor:
    """Attention with the relative positions as additional columns of the query, against one-hot columns of the key.

    Runs in the fused kernels of GPUs, and is differentiable without [N, N] tensors.

    Args:
        q, k, v: [B, heads, N, head_dim], N = H * W.
        rel_h, rel_w: [B, heads, N, H] and [B, heads, N, W], what each query adds for each row and column of keys.

    Returns:
        [B, heads, N, head_dim].
    """
    *_, N, head_dim = q.shape
    H, W = rel_h.shape[-1], rel_w.shape[-1]
    scale = head_dim**-0.5
    key_rows = torch.eye(H, dtype=q.dtype, device=q.device).repeat_interleave(W, dim=0)  # [N, H]
    key_columns = torch.eye(W, dtype=q.dtype, device=q.device).repeat(H, 1)  # [N, W]
    one_hot = torch.cat([key_rows, key_columns], dim=-1).expand(*q.shape[:2], N, H + W)
    out = F.scaled_dot_product_attention(
        torch.cat([q, rel_h / scale, rel_w / scale], dim=-1),
        torch.cat([k, one_hot], dim=-1),
        F.pad(v, (0, H + W)),  # the fused kernels want values as wide as the keys
        scale=scale,
    )
    return out[..., :head_dim]


# Elements of bias that `attend_with_bias` has in memory at a time: one head of a 64 x 64 grid.
MAX_BIAS_ELEMENTS = 2**24


def attend_with_bias(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_h: torch.Tensor, rel_w: torch.Tensor
) -> torch.Tensor:
    """Attention with the relative positions as a bias, for some heads at a time.

    The arguments and the result are those of `attend_widened`. CPUs spend less on the bias than on wider queries.
    """
    B, heads, N, _ = q.shape
    H, W = rel_h.shape[-1], rel_w.shape[-1]
    heads_at_once = min(heads, max(1, MAX_BIAS_ELEMENTS // (B * N * N)))
    buffer = q.new_empty(heads_at_once, B, N, H, W)  # one for all parts: memory as large is slow to get anew
    parts = []
    for start in range(0, heads, heads_at_once):
        part = slice(start, start + heads_at_once)
        bias = buffer[: min(heads_at_once, heads - start)].transpose(0, 1)  # [B, some heads, N, H, W]
        torch.add(rel_h[:, part, :, :, None], rel_w[:, part, :, None, :], out=bias)
        parts.append(F.scaled_dot_product_attention(q[:, part], k[:, part], v[:, part], attn_mask=bias.flatten(3)))
    return torch.cat(parts, dim=1)


class SAMBlock(nn.Module):
    """Pre-norm transformer block; `window_size` 0 attends globally over the `grid` x `grid` map."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, window_size: int, grid: int):
        super().__init__()
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, side=window_size or grid)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLPBlock(width, int(width * mlp_ratio))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, grid, grid, width] -> the same shape."""
        normed = self.norm1(x)
        if self.window_size:
            B, H, W, _ = x.shape
            attended = window_unpartition(
                self.attn(window_partition(normed, self.window_size)), self.window_size, B, H, W
            )
        else:
            attended = self.attn(normed)
        x = x + attended
        return x + self.mlp(self.norm2(x))


def window_partition(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B, H, W, C] -> [B * windows, size, size, C], padded with zeros at the bottom and right to whole windows."""
    B, H, W, C = x.shape
    x = F.pad(x, (0, 0, 0, -W % size, 0, -H % size))
    rows, columns = x.shape[1] // size, x.shape[2] // size
    return x.reshape(B, rows, size, columns, size, C).transpose(2, 3).reshape(B * rows * columns, size, size, C)


def window_unpartition(windows: torch.Tensor, size: int, B: int, H: int, W: int) -> torch.Tensor:
    """The inverse of `window_partition`: [B * windows, size, size, C] -> [B, H, W, C]."""
    C = windows.shape[-1]
    rows, columns = -(-H // size), -(-W // size)
    x = windows.reshape(B, rows, columns, size, size, C).transpose(2, 3).reshape(B, rows * size, columns * size, C)
    return x[:, :H, :W]


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

        self.patch_embed = PatchEmbed(variant.patch_size, variant.width)
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
        x = neck(x.permute(0, 3, 1, 2))
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

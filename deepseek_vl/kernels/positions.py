"""Attention with decomposed relative positions (ViTDet, arXiv 2203.16527), as SAM has it."""

import itertools
import math

import torch
import torch.nn.functional as F
from einops import repeat


def attend_with_positions(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_h: torch.Tensor, rel_w: torch.Tensor
) -> torch.Tensor:
    """Attention on a grid whose logits have a term for each row and one for each column of keys.

    Args:
        q, k, v: [B, heads, N, head_dim], N = H * W.
        rel_h, rel_w: [B, heads, N, H] and [B, heads, N, W], what each query adds for each row and column of keys.

    Returns:
        [B, heads, N, head_dim].
    """
    # Graphs that are exported or compiled cannot contain these loops and buffers.
    is_for_cpu = q.device.type == "cpu" and not rel_h.requires_grad and not torch.compiler.is_compiling()
    return (attend_with_bias if is_for_cpu else attend_widened)(q, k, v, rel_h, rel_w)


def attend_widened(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_h: torch.Tensor, rel_w: torch.Tensor
) -> torch.Tensor:
    """Attention with the relative positions as additional columns of the query, against one-hot columns of the key.

    Runs in the fused kernels of GPUs, and is differentiable without [N, N] tensors.

    The arguments and the result are those of `attend_with_positions`.
    """
    *_, N, head_dim = q.shape
    H, W = rel_h.shape[-1], rel_w.shape[-1]
    scale = head_dim**-0.5
    key_rows = repeat(torch.eye(H, dtype=q.dtype, device=q.device), "h row -> (h w) row", w=W)
    key_columns = repeat(torch.eye(W, dtype=q.dtype, device=q.device), "w column -> (h w) column", h=H)
    one_hot = torch.cat([key_rows, key_columns], dim=-1).expand(*q.shape[:2], N, H + W)
    out = F.scaled_dot_product_attention(
        torch.cat([q, rel_h / scale, rel_w / scale], dim=-1),
        torch.cat([k, one_hot], dim=-1),
        F.pad(v, (0, H + W)),  # the fused kernels want values as wide as the keys
        scale=scale,
    )
    return out[..., :head_dim]


MAX_BIAS_ELEMENTS = 2**24
"""The most bias elements in memory at a time in `attend_with_bias`: one head of one image on a grid of 64 x 64."""


def attend_with_bias(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_h: torch.Tensor, rel_w: torch.Tensor
) -> torch.Tensor:
    """Attention with the relative positions as a bias, for some grids and heads at a time.

    On CPUs this is faster than wider queries. The arguments and the result are those of `attend_with_positions`.
    """
    B, heads, N, _ = q.shape
    H, W = rel_h.shape[-1], rel_w.shape[-1]
    at_once = max(1, MAX_BIAS_ELEMENTS // N**2)
    grids_at_once = min(B, at_once)
    heads_at_once = min(heads, at_once // grids_at_once)
    buffer = q.new_empty(grids_at_once * heads_at_once * N**2)  # reused, as allocating so much anew is slow
    out = torch.empty_like(q)
    for grid, head in itertools.product(range(0, B, grids_at_once), range(0, heads, heads_at_once)):
        part = slice(grid, grid + grids_at_once), slice(head, head + heads_at_once)
        rows, columns = rel_h[part][..., :, None], rel_w[part][..., None, :]
        shape = (*rows.shape[:3], H, W)
        bias = torch.add(rows, columns, out=buffer[: math.prod(shape)].view(shape))
        out[part] = F.scaled_dot_product_attention(q[part], k[part], v[part], attn_mask=bias.flatten(3))
    return out

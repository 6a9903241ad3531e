"""Attention for inference: over each row's own keys and values, and on CPUs in float32 for narrow dtypes."""

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from deepseek_vl.kernels.policy import GPU_ATTENTION, MANY_ROWS, NARROW, kernel_for

ATTENTION = {
    ("plain", "plain"): "sdpa_rows",
    ("widening", "plain"): "sdpa_rows_float32_few",
    ("plain", "widening"): "sdpa_rows_float32_many",
    ("widening", "widening"): "sdpa_rows_float32",
}
"""Names of our attention in transformers, by the kernels for few and for many queries."""

CACHED_ELEMENTS = 2**20
"""The most elements of the keys, and of the values, widened at a time: 8 MB for both, which stay in the CPU's cache."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | list[torch.Tensor],
    value: torch.Tensor | list[torch.Tensor],
    attention_mask: torch.Tensor | None,
    *,
    few: bool = True,
    many: bool = True,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa`, with narrow dtypes optionally in float32, as many heads at a time as fit in the cache.

    Where gradients are enabled, and on GPUs, it always computes in the query's dtype.

    Args:
        module: the attention layer.
        query: [B, heads, T, head_dim].
        key, value: [B, kv_heads, past + T, head_dim]; or, for T = 1 and without a mask, a list of B tensors
            [1, kv_heads, past + T, head_dim], each with a past of its own.
        attention_mask: [B, 1, T, past + T], or None.
        few, many: whether to compute in float32 with fewer than `MANY_ROWS` queries, and with as many or more.
        kwargs: see `sdpa_attention_forward`.

    Returns:
        [B, T, heads, head_dim] in the query's dtype, and None for the attention weights.
    """
    is_to_widen = many if query.shape[2] >= MANY_ROWS else few
    is_to_widen &= query.dtype in NARROW and query.device.type == "cpu" and not torch.is_grad_enabled()
    if isinstance(key, list):
        rows = zip(query.split(1), key, value, strict=True)
        if is_to_widen:
            attended = torch.cat([attend(module, *row, None, few=few, many=many, **kwargs)[0] for row in rows])
        else:
            options = {"scale": kwargs.get("scaling"), "enable_gqa": query.shape[1] != key[0].shape[1]}
            attended = torch.cat([F.scaled_dot_product_attention(*row, **options) for row in rows]).transpose(1, 2)
        return attended, None
    if not is_to_widen:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows, kv_heads, length, head_dim = key.shape
    queries_per_key = query.shape[1] // kv_heads
    # Compiled code must be the same for every length, and fuses the conversion anyway.
    parts = 1 if torch.compiler.is_compiling() else math.ceil(kv_heads * length * head_dim / CACHED_ELEMENTS)
    heads_per_part = math.ceil(kv_heads / parts)
    attended = query.new_empty(rows, query.shape[2], query.shape[1], head_dim)
    for row, start in itertools.product(range(rows), range(0, kv_heads, heads_per_part)):
        held = (slice(row, row + 1), slice(start, start + heads_per_part))
        asked = (held[0], slice(start * queries_per_key, (start + heads_per_part) * queries_per_key))
        mask = None if attention_mask is None else attention_mask[row if len(attention_mask) > 1 else 0][None]
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
        part, _ = sdpa_attention_forward(
            module, query[asked].float(), key[held].float(), value[held].float(), mask, **kwargs
        )
        attended[asked[0], :, asked[1]] = part
    return attended, None


ROW_ATTENTION = {
    name: functools.partial(attend, few=few == "widening", many=many == "widening")
    for (few, many), name in (*ATTENTION.items(), (("plain", "plain"), "sdpa"))
}
"""`attend` by the name of an attention in transformers: those of `ATTENTION`, and `sdpa`."""

for _name in ATTENTION.values():
    AttentionInterface.register(_name, ROW_ATTENTION[_name])
    AttentionMaskInterface.register(_name, sdpa_mask)


def use_fastest_attention(model: PreTrainedModel) -> None:
    """Give a model that attends with `sdpa` the attention of this module that is fastest for its dtype, in place."""
    if model.config._attn_implementation == "sdpa":  # there is no public attribute
        few, many = (kernel_for(f"attention_{rows}", model.dtype) for rows in ("few", "many"))
        model.set_attn_implementation(ATTENTION[few, many])


@contextlib.contextmanager
def gpu_attention(device: torch.device) -> Iterator[None]:
    """Restrict PyTorch's attention to `GPU_ATTENTION` in a `with` block, if the device is a CUDA GPU.

    The setting is PyTorch's for the whole process, all threads included, and is restored after the block.
    """
    with sdpa_kernel(list(GPU_ATTENTION)) if device.type == "cuda" else contextlib.nullcontext():
        yield

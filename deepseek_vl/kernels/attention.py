"""Attention for inference on CPUs: keys and values narrow to be kept, and float32 to be multiplied.

Many queries PyTorch's kernel computes more slowly in bfloat16 and float16 than in float32, where the processor does not
multiply them fast; and few, as in decoding, where it multiplies vectors, on processors that are not Intel's.
"""

import itertools
import math
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from deepseek_vl.kernels.policy import INTEL, NARROW, WIDEN_ROWS, is_made_by, multiplies_fast

FLOAT32_ATTENTION = "sdpa_float32"
"""Name of this attention among transformers' implementations."""

CACHED_ELEMENTS = 2**20
"""So many elements of the keys, and of the values, are widened at a time: 8 MB of both, which stay in the cache."""

FEW_ARE_FASTER_NARROW = is_made_by(INTEL)
"""Whether few queries take less time in a narrow dtype. On an Intel Xeon without AMX, 24 layers of 16 heads and 660
positions take 4 ms in bfloat16 instead of 15 for one query, 24 instead of 27 for 20, and 65 instead of 51 for 64; one
query in float16, of which that processor has instructions, half as long as in float32."""


def attend_in_float32(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa`, of a narrow dtype in float32, as many heads at a time as fit in the cache.

    Where gradients are on, on other devices, and where that is the faster, it is plain `sdpa`.

    Args:
        module: the attention layer.
        query: [B, heads, T, head_dim].
        key, value: [B, kv_heads, past + T, head_dim].
        attention_mask: [B, 1, T, past + T], or None.
        kwargs: see `sdpa_attention_forward`.

    Returns:
        [B, T, heads, head_dim] in the query's dtype, and no weights.
    """
    is_faster_narrow = multiplies_fast(query.dtype) if query.shape[2] >= WIDEN_ROWS else FEW_ARE_FASTER_NARROW
    if query.dtype not in NARROW or query.device.type != "cpu" or torch.is_grad_enabled() or is_faster_narrow:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows, kv_heads, length, head_dim = key.shape
    queries_per_key = query.shape[1] // kv_heads
    # Code that is compiled holds for every length, and fuses the conversion anyway.
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


AttentionInterface.register(FLOAT32_ATTENTION, attend_in_float32)
AttentionMaskInterface.register(FLOAT32_ATTENTION, sdpa_mask)


def use_float32_attention(model: PreTrainedModel) -> None:
    """Let a model that attends with `sdpa` do so with `attend_in_float32`, in place."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(FLOAT32_ATTENTION)

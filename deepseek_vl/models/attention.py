"""Attention for inference on CPUs: keys and values narrow to be kept, and float32 to be multiplied.

PyTorch's kernel computes bfloat16 and float16 several times as slowly as float32 when there are few queries, as in
decoding, where it multiplies vectors.
"""

from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from deepseek_vl.models.linear import CHUNK_ELEMENTS, NARROW, WIDEN_ROWS

FLOAT32_ATTENTION = "sdpa_float32"
"""Name of this attention among transformers' implementations."""


def attend_in_float32(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa`; few queries of a narrow dtype in float32, as many heads at a time as fit in the cache.

    Where gradients are on, and on other devices, it is plain `sdpa`.

    Args:
        module: the attention layer.
        query: [B, heads, T, head_dim].
        key, value: [B, kv_heads, past + T, head_dim].
        attention_mask: [B, 1, T, past + T], or None.
        kwargs: see `sdpa_attention_forward`.

    Returns:
        [B, T, heads, head_dim] in the query's dtype, and no weights.
    """
    if (
        query.shape[2] >= WIDEN_ROWS
        or query.dtype not in NARROW
        or query.device.type != "cpu"
        or torch.is_grad_enabled()
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    kv_heads = key.shape[1]
    queries_per_key = query.shape[1] // kv_heads
    step = max(1, CHUNK_ELEMENTS * kv_heads // key.numel())
    parts = []
    for start in range(0, kv_heads, step):
        end = min(start + step, kv_heads)
        part = query[:, start * queries_per_key : end * queries_per_key].float()
        attended, _ = sdpa_attention_forward(
            module, part, key[:, start:end].float(), value[:, start:end].float(), attention_mask, **kwargs
        )
        parts.append(attended.to(query.dtype))
    return torch.cat(parts, dim=2), None


AttentionInterface.register(FLOAT32_ATTENTION, attend_in_float32)
AttentionMaskInterface.register(FLOAT32_ATTENTION, sdpa_mask)


def use_float32_attention(model: PreTrainedModel) -> None:
    """Let a model that attends with `sdpa` do so with `attend_in_float32`, in place."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(FLOAT32_ATTENTION)

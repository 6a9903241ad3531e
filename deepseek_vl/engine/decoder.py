"""Llama's layers over a flat list of tokens, with the attention passed in as a function.

transformers' own layers take a batch of equal lengths. Here the tokens may be from any conversations, at any positions.
Each layer is split into the parts before and after attention; compiled once, these two functions serve all layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, apply_rotary_pos_emb

from deepseek_vl.engine.kv_cache import RowCache
from deepseek_vl.kernels.attention import ROW_ATTENTION

Attention = Callable[[LlamaAttention, int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""The layer's attention module and number, query, key, value -> output; tensors are [tokens, heads, head_dim]."""


def before_attention(
    layer: LlamaDecoderLayer, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [tokens, D] and their positions' rotation [tokens, head_dim] -> query, key and value."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (project(normed).unflatten(-1, (-1, attention.head_dim)) for project in projections)
    return *apply_rotary_pos_emb(query, key, cos, sin), value


def after_attention(layer: LlamaDecoderLayer, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """Hidden states [tokens, D] and the attention's output [tokens, heads, head_dim] -> the next hidden states."""
    hidden = hidden + layer.self_attn.o_proj(attended.flatten(1))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


@dataclass(frozen=True)
class Decoder:
    """Runs a language model's layers.

    Attributes:
        before, after: `before_attention` and `after_attention`, or compiled versions of them.
    """

    before: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = before_attention
    after: Callable[..., torch.Tensor] = after_attention

    def run(
        self, language_model: PreTrainedModel, embeds: torch.Tensor, positions: torch.Tensor, attend: Attention
    ) -> torch.Tensor:
        """Run the language model without its head.

        Args:
            embeds: [tokens, D].
            positions: int64 [tokens].
            attend: computes the attention, and may store the tokens' keys and values.

        Returns:
            [tokens, D], the head's input.
        """
        model: Any = language_model.model  # LlamaModel
        cos, sin = (rotation[0] for rotation in model.rotary_emb(embeds, position_ids=positions[None]))
        hidden = embeds
        for number, layer in enumerate(model.layers):
            query, key, value = self.before(layer, hidden, cos, sin)
            hidden = self.after(layer, hidden, attend(layer.self_attn, number, query, key, value))
        return model.norm(hidden)


class CausalAttention:
    """Causal attention of a prompt's tokens, whose keys and values are added to a cache.

    Args:
        language_model: its configuration names the attention, one of `ROW_ATTENTION`.
        positions: int64 [tokens], the tokens' positions, the first of which is the cache's length.
    """

    def __init__(self, language_model: PreTrainedModel, cache: RowCache, positions: torch.Tensor):
        self._attend = ROW_ATTENTION[language_model.config._attn_implementation]
        self._cache = cache
        start, tokens = cache.get_seq_length(), len(positions)
        self._mask = None  # with an empty cache, the attention is causal without a mask
        if start:
            self._mask = (torch.arange(start + tokens, device=positions.device) <= positions[:, None])[None, None]

    def __call__(
        self, attention: LlamaAttention, number: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))  # [1, heads, T, head_dim]
        keys, values = self._cache.update(key, value, number)
        return self._attend(attention, query, keys, values, self._mask, scaling=attention.scaling)[0][0]


class RowsAttention:
    """Attention of one token per row to the row's own cache, to which the token's key and value are added.

    Args:
        language_model: as in `CausalAttention`.
        caches: one per row, which hold the tokens before.
    """

    def __init__(self, language_model: PreTrainedModel, caches: Sequence[RowCache]):
        self._attend = ROW_ATTENTION[language_model.config._attn_implementation]
        self._caches = caches

    def __call__(
        self, attention: LlamaAttention, number: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        added = zip(self._caches, key[:, None, :, None], value[:, None, :, None], strict=True)
        pairs = [cache.update(*states, number) for cache, *states in added]  # each [1, heads, length, head_dim]
        keys, values = pairs[0] if len(pairs) == 1 else map(list, zip(*pairs, strict=True))
        return self._attend(attention, query[:, :, None], keys, values, None, scaling=attention.scaling)[0][:, 0]

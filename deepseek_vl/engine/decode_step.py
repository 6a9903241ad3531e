"""The decoding step: one more token for every row of a batch; and prompts, piece by piece."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from deepseek_vl.engine.decoder import CausalAttention, Decoder, RowsAttention
from deepseek_vl.engine.kv_cache import RowCache, RowsCache
from deepseek_vl.kernels.attention import ATTENTION, ROW_ATTENTION
from deepseek_vl.models.modeling_vlm import CACHE


class Step:
    """Runs the prompts of rows, and then one more token for every row at a time."""

    def __call__(
        self, language_model: PreTrainedModel, token_ids: Sequence[int] | torch.Tensor, caches: Sequence[RowCache]
    ) -> torch.Tensor:
        """Run each row's last token, which its cache does not hold yet, and add it to the cache.

        Linear layers run on all rows together; each row attends to its own cache. With an attention implementation that
        `deepseek_vl.kernels.attention` does not have, rows run one by one.

        Args:
            token_ids: integers, or int64 [rows] on the model's device, which are used without waiting for the device.

        Returns:
            logits [rows, vocabulary] of the next tokens; valid until the next call.
        """
        if len(caches) > 1 and language_model.config._attn_implementation not in ATTENTION.values():
            ids = torch.as_tensor(token_ids)
            return torch.cat([self(language_model, ids[[i]], [cache]) for i, cache in enumerate(caches)])
        device = language_model.get_input_embeddings().weight.device
        ids = torch.as_tensor(token_ids, device=device)
        positions = torch.tensor([cache.get_seq_length() for cache in caches], device=device)
        cache = caches[0] if len(caches) == 1 else RowsCache(caches)
        output = language_model(
            input_ids=ids[:, None], position_ids=positions[:, None], use_cache=True, **{CACHE: cache}
        )
        return output.logits[:, -1]

    def prompt(
        self,
        language_model: PreTrainedModel,
        embed: Callable[[], torch.Tensor],
        cache: RowCache,
        token_ids: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Run the next tokens of a row's prompt, and add them to its cache.

        Args:
            embed: returns the tokens' embeddings, [1, T, D]; called only if they are needed.
            token_ids: the tokens' ids, if all of them are text.

        Returns:
            logits [1, vocabulary] of the next token; valid until the next call.
        """
        output = language_model(inputs_embeds=embed(), use_cache=True, logits_to_keep=1, **{CACHE: cache})
        return output.logits[:, -1]

    def forget(self) -> None:
        """Free what is valid only for the present weights. May be called from any thread."""


def runs_in_layers(language_model: PreTrainedModel) -> bool:
    """Whether `Decoder` can run a language model: a Llama on one device with an attention of `ROW_ATTENTION`."""
    return (
        isinstance(language_model, LlamaForCausalLM)
        and {parameter.device for parameter in language_model.parameters()} == {language_model.device}
        and language_model.config._attn_implementation in ROW_ATTENTION
    )


def has_hooks(language_model: PreTrainedModel) -> bool:
    """Whether a Llama has forward hooks on modules that `Decoder` does not call as a whole."""
    inner: Any = language_model.model
    modules = (language_model, inner, *inner.layers, *(layer.self_attn for layer in inner.layers))
    return any(module._forward_pre_hooks or module._forward_hooks for module in modules)  # there is no public list


class LayeredStep(Step):
    """A step that runs one language model's layers by `Decoder`, with less work between them than in transformers.

    Results are those of `Step` up to rounding.

    Args:
        language_model: one that `runs_in_layers`. Other models run as in `Step`, and so does this one while it has
            hooks on its layers.
        one, several: run its layers for one token, and for several; None for `Decoder()`.
    """

    def __init__(self, language_model: PreTrainedModel, one: Decoder | None = None, several: Decoder | None = None):
        self._language_model = weakref.ref(language_model)
        self._device = language_model.device
        self._decoders = one or Decoder(), several or Decoder()

    def __call__(
        self, language_model: PreTrainedModel, token_ids: Sequence[int] | torch.Tensor, caches: Sequence[RowCache]
    ) -> torch.Tensor:
        if not self._is_for(language_model):
            return super().__call__(language_model, token_ids, caches)
        places = torch.tensor([cache.get_seq_length() for cache in caches], device=self._device)
        embeds = language_model.get_input_embeddings()(torch.as_tensor(token_ids, device=self._device))
        return language_model.get_output_embeddings()(
            self._decoder(len(caches)).run(language_model, embeds, places, RowsAttention(language_model, caches))
        )

    def prompt(
        self,
        language_model: PreTrainedModel,
        embed: Callable[[], torch.Tensor],
        cache: RowCache,
        token_ids: Sequence[int] | None = None,
    ) -> torch.Tensor:
        if not self._is_for(language_model):
            return super().prompt(language_model, embed, cache, token_ids)
        (embeds,) = embed()
        start, tokens = cache.get_seq_length(), len(embeds)
        positions = torch.arange(start, start + tokens, device=self._device)
        attend = CausalAttention(language_model, cache, positions)
        hidden = self._decoder(tokens).run(language_model, embeds, positions, attend)
        return language_model.get_output_embeddings()(hidden[-1:])

    def _is_for(self, language_model: PreTrainedModel) -> bool:
        return (
            language_model is self._language_model()
            and language_model.device == self._device
            and not has_hooks(language_model)
        )

    def _decoder(self, tokens: int) -> Decoder:
        return self._decoders[tokens > 1]

"""The decoding step: one more token for every row of a batch; and prompts, piece by piece."""

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from deepseek_vl.engine.decoder import CausalAttention, Decoder, RowsAttention
from deepseek_vl.engine.kv_cache import RowCache, RowsCache
from deepseek_vl.kernels.attention import ATTENTION, ROW_ATTENTION
from deepseek_vl.models.modeling_vlm import CACHE

logger = logging.getLogger(__name__)


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


class ForwardHooks:
    """The forward hooks of some modules, to be asked for again and again.

    Hooks that transformers adds when hidden states are asked for, and never removes, do not count.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        # There is no public list of hooks.
        self._of = [hooks for module in modules for hooks in (module._forward_pre_hooks, module._forward_hooks)]

    def __bool__(self) -> bool:
        return any(self._of) and any(
            getattr(hook, "__module__", "") != "transformers.utils.output_capturing"
            for hooks in self._of
            for hook in hooks.values()
        )


class LayeredStep(Step):
    """A step that runs one language model's layers by `Decoder`, with less work between them than in transformers.

    Results are those of `Step` up to rounding.

    Args:
        language_model: one that `runs_in_layers`. Other models run as in `Step`, and so does this one while it has
            forward hooks that would not be called otherwise.
        one, several: run its layers for one token, and for several; None for `Decoder()`.
    """

    calls_modules = True
    """Whether each run calls the modules within the layers, such as `mlp`, and so their hooks."""

    def __init__(self, language_model: PreTrainedModel, one: Decoder | None = None, several: Decoder | None = None):
        self._language_model = weakref.ref(language_model)
        self._device = language_model.device
        self._decoders = one or Decoder(), several or Decoder()
        self.calls_modules = self.calls_modules and one is several is None
        self._hooks: ForwardHooks | None = None
        self._had_hooks = False

    def __call__(
        self, language_model: PreTrainedModel, token_ids: Sequence[int] | torch.Tensor, caches: Sequence[RowCache]
    ) -> torch.Tensor:
        if not self.is_for(language_model):
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
        if not self.is_for(language_model):
            return super().prompt(language_model, embed, cache, token_ids)
        (embeds,) = embed()
        start, tokens = cache.get_seq_length(), len(embeds)
        positions = torch.arange(start, start + tokens, device=self._device)
        attend = CausalAttention(language_model, cache, positions)
        hidden = self._decoder(tokens).run(language_model, embeds, positions, attend)
        return language_model.get_output_embeddings()(hidden[-1:])

    def forget(self) -> None:
        self._hooks = None  # modules may have been replaced

    def is_for(self, language_model: PreTrainedModel) -> bool:
        """Whether this step runs a model's layers itself."""
        if (
            language_model is not self._language_model()
            or language_model.device != self._device
            or language_model.config._attn_implementation not in ROW_ATTENTION
        ):
            return False
        hooks = self._hooks  # read once: another thread may forget them
        if hooks is None:
            self._hooks = hooks = ForwardHooks(self._uncalled(language_model))
        had_hooks, self._had_hooks = self._had_hooks, bool(hooks)
        if self._had_hooks and not had_hooks:
            logger.info("The language model has forward hooks, and runs by transformers' slower layers for their sake.")
        return not self._had_hooks

    def _uncalled(self, language_model: PreTrainedModel) -> Iterator[nn.Module]:
        """The modules that are not called by each run."""
        if self.calls_modules:
            inner: Any = language_model.model
            yield from (language_model, inner, *inner.layers, *(layer.self_attn for layer in inner.layers))
        else:
            yield from language_model.modules()

    def _decoder(self, tokens: int) -> Decoder:
        return self._decoders[tokens > 1]

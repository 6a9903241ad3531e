"""The decoding step: one more token for every row of a batch, either uncompiled or, on CPUs, compiled."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from deepseek_vl.engine.kv_cache import Buffers, RowCache, RowsCache
from deepseek_vl.kernels.attention import ATTENTION
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


class CompiledStep(Step):
    """A step for CPUs that is compiled for a single row.

    One compilation serves any number of positions. Several rows run uncompiled, as each number of rows would have to be
    compiled anew. Results are those of `Step` up to rounding.

    Args:
        language_model: the model to compile, on a CPU. Other models run uncompiled.
    """

    def __init__(self, language_model: PreTrainedModel):
        self._language_model = language_model
        self._compiled = torch.compile(self._run)

    def __call__(
        self, language_model: PreTrainedModel, token_ids: Sequence[int] | torch.Tensor, caches: Sequence[RowCache]
    ) -> torch.Tensor:
        if language_model is not self._language_model or len(caches) > 1:
            return super().__call__(language_model, token_ids, caches)
        (token_id,), (cache,) = token_ids, caches
        place = cache.get_seq_length()
        cache.reserve(place + 1)
        buffers = [layer.buffers for layer in cache.layers]
        for buffer in (buffer for pair in buffers for buffer in pair):
            torch._dynamo.mark_dynamic(buffer, 2)  # their capacity
        logits = self._compiled(torch.tensor([[token_id, place]]), buffers)
        cache.truncate(place + 1)
        return logits

    def _run(self, numbers: torch.Tensor, buffers: Sequence[Buffers]) -> torch.Tensor:
        """The function that is compiled. It takes only tensors: new values of Python numbers would compile it anew.

        Args:
            numbers: int64 [1, 2]: the row's token, and its position, which is also its index in the buffers.
            buffers: each layer's.

        Returns:
            logits [1, vocabulary].
        """
        token_ids, places = numbers[:, :, None].unbind(1)  # each [1, 1]
        columns = torch.arange(buffers[0][0].shape[2], device=numbers.device)
        is_seen = columns <= places  # [1, capacity]
        output = self._language_model(
            input_ids=token_ids,
            position_ids=places,
            attention_mask=is_seen[:, None, None],
            **{CACHE: Cache(layers=[_PlacedLayer(*pair, places[0]) for pair in buffers])},
            use_cache=True,
        )
        return output.logits[:, -1]


class _PlacedLayer(DynamicLayer):
    """One layer's keys and values in buffers; new ones are written at a position given as a tensor, int64 [1]."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, place: torch.Tensor):
        super().__init__()
        self.keys, self.values, self._place = keys, values, place
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [1, heads, 1, head_dim]; returns the whole buffers."""
        self.keys.index_copy_(2, self._place, key_states)
        self.values.index_copy_(2, self._place, value_states)
        return self.keys, self.values

"""The decoding step on GPUs, as CUDA graphs.

A token takes a few hundred small kernels, which a GPU runs faster than Python launches them one by one. A graph
launches them at once, on inputs and outputs at fixed addresses. The addresses of the rows' keys and values are one of
the inputs, so that one graph serves any rows.
"""

import logging
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from deepseek_vl.engine.decode_step import LayeredStep, runs_in_layers
from deepseek_vl.engine.decoder import Decoder
from deepseek_vl.engine.kv_cache import RowCache
from deepseek_vl.kernels.row_attention import attend_rows, is_available

logger = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 32, 64)
"""The numbers of rows for which there are graphs. Other numbers of rows run on the next larger graph, whose spare rows'
results are not used."""

_capturing = threading.Lock()
"""PyTorch captures one graph at a time in a process."""


def can_be_graphed(language_model: PreTrainedModel) -> bool:
    """Whether a language model can run as CUDA graphs: one that `runs_in_layers`, on a GPU."""
    return is_available() and language_model.device.type == "cuda" and runs_in_layers(language_model)


class GraphedStep(LayeredStep):
    """A step that runs one language model as CUDA graphs.

    Args:
        language_model: one that `can_be_graphed`. Other models run as in `Step`.
        one, several: as in `LayeredStep`.
    """

    calls_modules = False  # but once, when a graph is captured

    def __init__(self, language_model: PreTrainedModel, one: Decoder | None = None, several: Decoder | None = None):
        super().__init__(language_model, one, several)
        # A stream of its own, as a shared one may belong to another GPU.
        self._stream = torch.cuda.Stream(language_model.device)
        self._captured: _Captured | None = None
        self.forget()

    def __call__(
        self, language_model: PreTrainedModel, token_ids: Sequence[int] | torch.Tensor, caches: Sequence[RowCache]
    ) -> torch.Tensor:
        places = [cache.get_seq_length() for cache in caches]
        logits = self._run(language_model, token_ids, caches, places)
        return super().__call__(language_model, token_ids, caches) if logits is None else logits

    def prompt(
        self,
        language_model: PreTrainedModel,
        embed: Callable[[], torch.Tensor],
        cache: RowCache,
        token_ids: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """`Step.prompt`; a few text tokens after cached ones run on a graph, as rows that share one cache."""
        start = cache.get_seq_length()
        if token_ids is not None and start:
            tokens = len(token_ids)
            logits = self._run(language_model, token_ids, [cache] * tokens, range(start, start + tokens))
            if logits is not None:
                return logits[-1:]
        return super().prompt(language_model, embed, cache, token_ids)

    def capture(self, language_model: PreTrainedModel, rows: int) -> None:
        """Capture the graph for this many rows before it is needed.

        Raises:
            RuntimeError: if it cannot be captured.
        """
        with torch.cuda.device(language_model.device):
            self._graph(language_model, rows)

    def forget(self) -> None:
        """Free the graphs, which read weights at fixed addresses. May be called from any thread."""
        super().forget()
        self._captured, self._most = None, ROWS[-1]

    def _run(
        self,
        language_model: PreTrainedModel,
        token_ids: Sequence[int] | torch.Tensor,
        caches: Sequence[RowCache],
        places: Sequence[int],
    ) -> torch.Tensor | None:
        """Run tokens at given positions of their caches, and add them to the caches.

        Returns:
            logits [tokens, vocabulary]; None if no graph can run the tokens.
        """
        if not self.is_for(language_model) or len(caches) > self._most:
            return None
        for cache, place in zip(caches, places, strict=True):
            cache.reserve(place + 1)
        try:
            with torch.cuda.device(language_model.device):
                graph = self._graph(language_model, len(caches))
                logits = graph(token_ids, caches, places)
        except RuntimeError:  # out of memory, or an operation that cannot be captured
            self._captured, self._most = None, math.ceil(len(caches) / 2) - 1
            logger.warning("No CUDA graph of %d tokens: they run one kernel at a time.", len(caches), exc_info=True)
            return None
        for cache, place in zip(caches, places, strict=True):
            cache.truncate(place + 1)
        return logits

    def _graph(self, language_model: PreTrainedModel, tokens: int) -> "_Graph":
        self._captured = captured = self._captured or _Captured()
        rows = next(rows for rows in ROWS if rows >= tokens)
        if rows not in captured.graphs:
            graph = _Graph(language_model, self._decoder(rows), rows, self._stream, captured.pool)
            captured.graphs[rows] = graph
        return captured.graphs[rows]


@dataclass
class _Captured:
    """Graphs by their number of rows, and the memory pool that they share."""

    pool: Any = field(default_factory=torch.cuda.graph_pool_handle)
    graphs: dict[int, "_Graph"] = field(default_factory=dict)


def _capture(
    run: Callable[[], torch.Tensor], stream: torch.cuda.Stream, pool: Any
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Capture `run`, whose inputs stay at fixed addresses; returns the graph and its output, which stays as well."""
    graph = torch.cuda.CUDAGraph()
    with _capturing:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels, and lets libraries get their own memory
            for _ in range(2):
                run()
        # Other threads may go on using CUDA: they prepare other requests' images.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            output = run()
    return graph, output


class _Graph:
    """The captured step for a fixed number of rows.

    It reads `_inputs`, int64 [2, rows], the tokens and their positions; and `_table`, int64 [2 * layers + 1, rows], the
    addresses of each layer's keys and values, and last the stride from one head to the next.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        decoder: Decoder,
        rows: int,
        stream: torch.cuda.Stream,
        pool: Any,
    ):
        config, device = language_model.config, language_model.device
        layers = config.num_hidden_layers
        # Spare rows write here.
        head_dim = language_model.model.layers[0].self_attn.head_dim
        self._spare = torch.zeros(config.num_key_value_heads, head_dim, dtype=language_model.dtype, device=device)
        self._idle = [self._spare.data_ptr()] * (2 * layers) + [head_dim]
        self._rows = rows
        self._layout: list[weakref.ref[torch.Tensor]] = []
        self._inputs = torch.zeros(2, rows, dtype=torch.long, device=device)
        self._table = torch.tensor(self._idle, device=device)[:, None].repeat(1, rows)
        self._graph, self._logits = _capture(lambda: self._run(language_model, decoder), stream, pool)

    def _run(self, language_model: PreTrainedModel, decoder: Decoder) -> torch.Tensor:
        token_ids, places = self._inputs
        table, strides = self._table[:-1].view(-1, 2, self._rows), self._table[-1]

        def attend(
            attention: LlamaAttention, number: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            return attend_rows(query, key, value, table[number], strides, places, attention.scaling)

        embeds = language_model.get_input_embeddings()(token_ids)
        hidden = decoder.run(language_model, embeds, places, attend)
        return language_model.get_output_embeddings()(hidden)

    def __call__(
        self, token_ids: Sequence[int] | torch.Tensor, caches: Sequence[RowCache], places: Sequence[int]
    ) -> torch.Tensor:
        """Run the graph; returns logits [tokens, vocabulary], which are valid until any graph runs again."""
        self._lay_out(caches)
        spare = [0] * (self._rows - len(caches))
        places = [*places, *spare]
        if isinstance(token_ids, torch.Tensor):
            self._inputs[0, : len(caches)].copy_(token_ids)
            _send([places], self._inputs[1:])
        else:
            _send([[*token_ids, *spare], places], self._inputs)
        self._graph.replay()
        return self._logits[: len(caches)]

    def _lay_out(self, caches: Sequence[RowCache]) -> None:
        """Write the addresses of the rows' keys and values to the table, if they have changed."""
        # The last layer's buffers, which are the last to grow.
        layout = [cache.layers[-1].buffers[0] for cache in caches]
        if len(layout) == len(self._layout) and all(
            before() is now for before, now in zip(self._layout, layout, strict=True)
        ):
            return
        columns = [
            [buffer.data_ptr() for layer in cache.layers for buffer in layer.buffers] + [buffer.stride(1)]
            for cache, buffer in zip(caches, layout, strict=True)
        ]
        columns += [self._idle] * (self._rows - len(caches))
        _send([list(row) for row in zip(*columns, strict=True)], self._table)
        self._layout = list(map(weakref.ref, layout))


def _send(numbers: Sequence[Sequence[int]], to: torch.Tensor) -> None:
    """Copy numbers to a GPU without waiting for what runs there."""
    to.copy_(torch.tensor(numbers).pin_memory(), non_blocking=True)

"""One more token for every row of a batch: plainly, or in one compiled function, which GPUs replay as a CUDA graph.

Launched one by one, the few hundred small kernels of a token take a GPU less time than they take Python to launch. A
graph launches them at once, on inputs and outputs whose addresses stay the same.
"""

import logging
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from deepseek_vl.engine.kv_cache import Buffers, RowCache, RowsCache, SharedBuffers
from deepseek_vl.kernels.attention import ATTENTION
from deepseek_vl.kernels.compiling import CompilationError, compiling
from deepseek_vl.kernels.quantized import QuantizedLinear
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.models.modeling_vlm import CACHE

logger = logging.getLogger(__name__)

TYPICAL_POSITIONS = 1024
"""Compiled code holds for every number of positions, and is best for so many."""


class Step:
    """One more token for every row."""

    def __call__(
        self, language_model: PreTrainedModel, token_ids: Sequence[int], caches: Sequence[RowCache]
    ) -> torch.Tensor:
        """Run each row's last token, which its cache does not hold yet, and add it to the cache.

        The products are the rows' together; each row attends to what it holds alone. A model that attends in a way of
        which `deepseek_vl.kernels.attention` knows nothing runs row by row.

        Returns:
            logits [rows, vocabulary] of the next ones; to be read before the next call.
        """
        if len(caches) > 1 and language_model.config._attn_implementation not in ATTENTION.values():
            pairs = zip(token_ids, caches, strict=True)
            return torch.cat([self(language_model, [token_id], [cache]) for token_id, cache in pairs])
        device = language_model.get_input_embeddings().weight.device
        numbers = [[token_id, cache.get_seq_length()] for token_id, cache in zip(token_ids, caches, strict=True)]
        ids, positions = torch.tensor(numbers, device=device)[:, :, None].unbind(1)  # each [rows, 1]
        cache = caches[0] if len(caches) == 1 else RowsCache(caches)
        output = language_model(input_ids=ids, position_ids=positions, use_cache=True, **{CACHE: cache})
        return output.logits[:, -1]

    def forget(self) -> None:
        """Let go of what holds for the weights as they are only. May be called from any thread."""


class CompiledStep(Step):
    """One more token for every row of one language model, compiled if there is one row.

    It is compiled for any number of positions, and on GPUs replayed as a graph. Several rows run plainly: each number
    of them would have to be compiled anew. Answers are those of `Step` up to rounding.

    Args:
        language_model: on one device, a CPU or a CUDA GPU. Other models run plainly.
    """

    def __init__(self, language_model: PreTrainedModel):
        self._language_model = language_model
        self._compiled = torch.compile(self._run)
        is_graphed = language_model.device.type == "cuda"
        self._graphs = _Graphs(self._run_compiled, language_model.device) if is_graphed else None

    def __call__(
        self, language_model: PreTrainedModel, token_ids: Sequence[int], caches: Sequence[RowCache]
    ) -> torch.Tensor:
        if language_model is not self._language_model or len(caches) > 1:
            return super().__call__(language_model, token_ids, caches)
        (token_id,), (cache,) = token_ids, caches
        place = cache.get_seq_length()
        numbers = torch.tensor([[token_id, place]])
        if self._graphs is None:
            logits = self._run_compiled(numbers, [layer.reserve(place + 1) for layer in cache.layers])
        else:
            logits = self._graphs.replay(numbers, cache)
            if logits is None:
                return super().__call__(language_model, token_ids, caches)
        for layer in cache.layers:
            layer.show(place + 1)
        return logits

    def forget(self) -> None:
        if self._graphs is not None:
            self._graphs.clear()

    def _run_compiled(self, numbers: torch.Tensor, buffers: Sequence[Buffers]) -> torch.Tensor:
        for buffer in (buffer for pair in buffers for buffer in pair):
            torch._dynamo.mark_dynamic(buffer, 2)  # their capacity
        return self._compiled(numbers, buffers)

    def _run(self, numbers: torch.Tensor, buffers: Sequence[Buffers]) -> torch.Tensor:
        """What is compiled: nothing in it depends on Python's numbers.

        Args:
            numbers: int64 [1, 2]: the row's token, and its position, which is also its place in the buffers.
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
    """One layer's keys and values in buffers, to which a token is written in a place that is a tensor, int64 [1]."""

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


_capturing = threading.Lock()
"""PyTorch captures one graph at a time in a process."""


@dataclass
class _GraphedStep:
    """A step as a CUDA graph, the numbers that it reads, and the logits that it writes."""

    graph: torch.cuda.CUDAGraph
    numbers: torch.Tensor
    logits: torch.Tensor

    def __call__(self, numbers: torch.Tensor) -> torch.Tensor:
        self.numbers.copy_(numbers)
        self.graph.replay()
        return self.logits


@dataclass
class _Captured:
    """Graphed steps by the shape of their buffers, and the memory that all of them use."""

    buffers: SharedBuffers
    pool: tuple[int, int] = field(default_factory=torch.cuda.graph_pool_handle)
    steps: dict[torch.Size, _GraphedStep] = field(default_factory=dict)


class _Graphs:
    """CUDA graphs of one row's step, one for each capacity.

    Args:
        run: numbers on the device, and each layer's buffers -> logits.
        device: the GPU.
    """

    def __init__(self, run: Callable[[torch.Tensor, Sequence[Buffers]], torch.Tensor], device: torch.device):
        self._run = run
        self._device = device
        # Its own: a stream that is shared may belong to another GPU.
        self._stream = torch.cuda.Stream(device)
        self.clear()

    def clear(self) -> None:
        """Free them. May be called from any thread; a step that runs goes on with what it has."""
        self._captured: _Captured | None = None
        self._too_large = math.inf

    def replay(self, numbers: torch.Tensor, cache: RowCache) -> torch.Tensor | None:
        """Run a step on a cache, which then is in the graphs' memory.

        Returns:
            logits [1, vocabulary]; None if there is not enough memory.
        """
        positions = cache.get_seq_length() + 1
        if positions >= self._too_large:
            return None
        try:
            return self._replay(numbers, cache)
        except torch.OutOfMemoryError:
            logger.warning("Too little memory for a CUDA graph of %d positions: they are computed without.", positions)
        self.clear()
        self._too_large = positions
        return None

    def _replay(self, numbers: torch.Tensor, cache: RowCache) -> torch.Tensor:
        captured = self._captured
        if captured is None or not captured.buffers.has_room(cache):
            self._captured = captured = None  # freed before there is more
            self._captured = captured = _Captured(SharedBuffers(cache))
        buffers = captured.buffers.lend(cache)
        shape = buffers[0][0].shape
        with torch.cuda.device(self._device):
            if shape not in captured.steps:
                captured.steps[shape] = self._capture(numbers, buffers, captured.pool)
            return captured.steps[shape](numbers)

    def _capture(self, numbers: torch.Tensor, buffers: list[Buffers], pool: tuple[int, int]) -> _GraphedStep:
        inputs, graph = numbers.to(self._device), torch.cuda.CUDAGraph()
        with _capturing:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):  # compiles it, and lets libraries get their own memory
                for _ in range(2):
                    self._run(inputs, buffers)
            # Other threads may go on: they prepare other requests' images.
            with torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"):
                logits = self._run(inputs, buffers)
        return _GraphedStep(graph, inputs, logits)


def check_compile(device: torch.device, is_quantised: bool) -> None:
    """Whether a model on this device, with quantised weights or others, can be compiled, as far as is known beforehand.

    Raises:
        ValueError: if it cannot.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"Models are compiled for the CPU and for CUDA, not for {device.type}.")
    if device.type == "cpu" and is_quantised:
        raise ValueError("With quantised weights on the CPU compiling gains nothing; leave --compile out.")


def compile_step(
    model: MultiModalityCausalLM, processor: VLChatProcessor, progress: Callable[[str], None]
) -> CompiledStep:
    """Compile a model's step, and on GPUs its vision tower in place, and run both once.

    Takes and raises what `Engine.compile` does.
    """
    is_quantised = any(isinstance(module, QuantizedLinear) for module in model.modules())
    check_compile(model.device, is_quantised)
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ValueError("A model that is spread over several devices cannot be compiled.")
    attention = model.language_model.config._attn_implementation
    if attention not in ("sdpa", *ATTENTION.values()):
        raise ValueError(f"Compiled models attend with sdpa, not with {attention}; leave attn_implementation out.")
    # On CPUs a tower's products take all the time.
    encoders = (model.vision_model, model.aligner) if model.device.type == "cuda" else ()
    try:
        # In a thread, as the engine runs it: how many threads a thread may use is part of what is compiled.
        with compiling(encoders), ThreadPoolExecutor(1) as thread:
            if encoders:
                progress("Compiling the vision tower ...")
                thread.submit(_encode_blanks, model, processor).result()
            progress("Compiling the language model ...")
            step = CompiledStep(model.language_model)
            thread.submit(_answer_nothing, model, step).result()
    except CompilationError as error:
        raise ValueError(f"The model cannot be compiled on this machine: {error}") from error
    return step


@torch.inference_mode()
def _encode_blanks(model: MultiModalityCausalLM, processor: VLChatProcessor) -> None:
    side = processor.image_processor.image_size
    for count in (1, 2):  # the second is compiled for every number above 1
        model.get_image_features(torch.zeros(count, 3, side, side, device=model.device, dtype=model.dtype))


@torch.inference_mode()
def _answer_nothing(model: MultiModalityCausalLM, step: CompiledStep) -> None:
    cache = RowCache()
    first = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model.language_model(input_ids=first, use_cache=True, **{CACHE: cache})
    for layer in cache.layers:
        layer.reserve(TYPICAL_POSITIONS)
    step(model.language_model, [0], [cache])

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

from deepseek_vl.engine.kv_cache import Buffers, RowCache, SharedBuffers
from deepseek_vl.kernels.attention import ATTENTION
from deepseek_vl.kernels.compiling import CompilationError, compiling
from deepseek_vl.kernels.int8 import Int8Linear
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.models.modeling_vlm import CACHE

logger = logging.getLogger(__name__)

TYPICAL_POSITIONS = 1024
"""Compiled code holds for every number of positions, and is best for so many."""


class Step:
    """One more token for every row."""

    def __call__(self, language_model: PreTrainedModel, token_ids: Sequence[int], cache: RowCache) -> torch.Tensor:
        """Run each row's last token, which `cache` does not hold yet, and add it to the cache.

        Returns:
            logits [rows, vocabulary] of the next ones; to be read before the next call.
        """
        device = language_model.get_input_embeddings().weight.device
        output = language_model(
            input_ids=torch.tensor(token_ids, device=device)[:, None],
            **{CACHE: cache},
            use_cache=True,
            **cache.step_arguments(device),
        )
        return output.logits[:, -1]

    def forget(self) -> None:
        """Let go of what holds for the weights as they are only. May be called from any thread."""


class CompiledStep(Step):
    """One more token for every row of one language model, compiled.

    One row's step is compiled, for any number of positions. Several rows' is not, because each number of rows would
    have to be compiled anew; on GPUs it too is replayed as a graph. Answers are those of `Step` up to rounding.

    Args:
        language_model: on one device, a CPU or a CUDA GPU. Other models run plainly.
    """

    def __init__(self, language_model: PreTrainedModel):
        self._language_model = language_model
        self._compiled = torch.compile(self._run)
        is_graphed = language_model.device.type == "cuda"
        self._graphs = _Graphs(self._run_fastest, language_model.device) if is_graphed else None

    def __call__(self, language_model: PreTrainedModel, token_ids: Sequence[int], cache: RowCache) -> torch.Tensor:
        rows = len(token_ids)
        if language_model is not self._language_model or (rows > 1 and self._graphs is None):
            return super().__call__(language_model, token_ids, cache)
        place = cache.get_seq_length()
        numbers = torch.tensor(
            [
                [token_id, position, place - position, place]
                for token_id, position in zip(token_ids, cache.lengths, strict=True)
            ]
        )
        if self._graphs is None:
            logits = self._run_fastest(numbers, [layer.reserve(place + 1) for layer in cache.layers])
        else:
            logits = self._graphs.replay(numbers, cache)
            if logits is None:
                return super().__call__(language_model, token_ids, cache)
        for layer in cache.layers:
            layer.show(place + 1)
        cache.count()
        return logits

    def forget(self) -> None:
        if self._graphs is not None:
            self._graphs.clear()

    def _run_fastest(self, numbers: torch.Tensor, buffers: Sequence[Buffers]) -> torch.Tensor:
        if len(numbers) > 1:
            return self._run(numbers, buffers)
        for buffer in (buffer for pair in buffers for buffer in pair):
            torch._dynamo.mark_dynamic(buffer, 2)  # their capacity
        return self._compiled(numbers, buffers)

    def _run(self, numbers: torch.Tensor, buffers: Sequence[Buffers]) -> torch.Tensor:
        """What is compiled: nothing in it depends on Python's numbers.

        Args:
            numbers: int64 [rows, 4]: a row's token, its position, how much padding is in front of the row, and where in
                the buffers the token belongs, which is the same in every row.
            buffers: each layer's.

        Returns:
            logits [rows, vocabulary].
        """
        token_ids, positions, padding, places = numbers[:, :, None].unbind(1)  # each [rows, 1]
        columns = torch.arange(buffers[0][0].shape[2], device=numbers.device)
        is_seen = (columns >= padding) & (columns <= places)  # [rows, capacity]
        output = self._language_model(
            input_ids=token_ids,
            position_ids=positions,
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
        """Write [rows, heads, 1, head_dim]; returns the whole buffers."""
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
    """CUDA graphs of a step, one for each number of rows and each capacity.

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
            logits [rows, vocabulary]; None if there is not enough memory.
        """
        positions = len(numbers) * (cache.get_seq_length() + 1)
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


def check_compile(device: torch.device, quantize: str | None) -> None:
    """Whether a model on this device, with weights quantised so, can be compiled, as far as is known beforehand.

    Raises:
        ValueError: if it cannot.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"Models are compiled for the CPU and for CUDA, not for {device.type}.")
    if device.type == "cpu" and quantize is not None:
        raise ValueError(f"With {quantize} weights on the CPU compiling gains nothing; leave --compile out.")


def compile_step(
    model: MultiModalityCausalLM, processor: VLChatProcessor, progress: Callable[[str], None]
) -> CompiledStep:
    """Compile a model's step, and on GPUs its vision tower in place, and run both once.

    Takes and raises what `Engine.compile` does.
    """
    is_int8 = any(isinstance(module, Int8Linear) for module in model.modules())
    check_compile(model.device, "int8" if is_int8 else None)
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ValueError("A model that is spread over several devices cannot be compiled.")
    attention = model.language_model.config._attn_implementation
    if attention not in ATTENTION.values():
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
    cache = RowCache([1])
    first = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model.language_model(input_ids=first, use_cache=True, **{CACHE: cache})
    for layer in cache.layers:
        layer.reserve(TYPICAL_POSITIONS)
    step(model.language_model, [0], cache)

"""The engine: generates the answers of all front-ends, many at once.

An `Engine` has one thread. Each answer is a row with keys and values of its own. A new row's prompt runs piece by
piece, and between the pieces a decoding step adds one token to every answer that has begun. An answer ends, fails or is
stopped independently of the others, within one piece or step.

Keys, values and image features of answers are cached: a later prompt runs only what follows its longest common prefix
with a cached conversation, and cached images are not encoded again. In float32 greedy answers are the same as without
the caches. In narrower dtypes they may differ where two tokens are almost equally likely, since the caches, like
batches, change the order of sums.
"""

import atexit
import collections
import logging
import math
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from deepseek_vl.engine.compiling import compile_step, step_for
from deepseek_vl.engine.decode_step import Step
from deepseek_vl.engine.generation import Generation, MemoryBudgetError, PromptTooLongError
from deepseek_vl.engine.kv_cache import STEP, RowCache
from deepseek_vl.engine.limits import EngineLimits, default_memory
from deepseek_vl.engine.prefix_cache import Caches, weight_bytes
from deepseek_vl.engine.prompt import Prompt
from deepseek_vl.kernels.attention import gpu_attention
from deepseek_vl.kernels.device import free_memory
from deepseek_vl.models import MultiModalityCausalLM

logger = logging.getLogger(__name__)


PIECE = 384
"""The most tokens of a prompt's piece on a slow machine; prompts are split evenly. Smaller pieces would take hardly
less time, as every piece reads all weights."""

LARGEST_PIECE = 4096
"""The most tokens of a piece on any machine."""

IMAGES_AT_A_TIME = 4
"""The batch size for encoding images on GPUs. CPUs encode them one by one, and gain nothing from batches."""


@dataclass(eq=False)
class _Row:
    """An answer that is being generated.

    Attributes:
        reserved_bytes: memory set aside for its keys, values and pixels.
        prompt, cache: None until the prompt's turn comes; the cache holds what has run of prompt and answer.
        features: encoded images of the prompt, by their keys; None as soon as all of the prompt has run.
        caches: the engine's caches when the prompt began; a weak reference, so that dropped caches are freed at once.
    """

    generation: Generation
    reserved_bytes: int
    prompt: Prompt | None = None
    cache: RowCache | None = None
    features: dict[bytes, torch.Tensor] | None = field(default_factory=dict)
    caches: weakref.ref[Caches] | None = None

    @property
    def has_begun(self) -> bool:
        """Whether the prompt has run, and the answer has a token."""
        return self.features is None


@dataclass
class _Ahead:
    """A step that was started before it was known which answers go on.

    Attributes:
        rows: the rows that it runs.
        logits: float32 [rows, vocabulary].
    """

    rows: list[_Row]
    logits: torch.Tensor


class Engine:
    """Generates the answers that are submitted, as many at a time as its limits say; the others wait in order.

    It has one thread while there is work. On CUDA GPUs the thread stays from the first answer until the engine is
    closed or no longer referenced, as CUDA's libraries initialise once per thread.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        limits: how much is computed at a time, and cached; None for the defaults.

    Attributes:
        tokenizer, limits: as given.
        step: computes one more token for every row.
        runs_ahead: whether a step starts before the last one's tokens are read; true on GPUs, which would be idle until
            then.
    """

    def __init__(
        self, model: MultiModalityCausalLM, tokenizer: PreTrainedTokenizerBase, limits: EngineLimits | None = None
    ):
        self.tokenizer = tokenizer
        self.limits = limits or EngineLimits()
        self.step = step_for(model)
        self._model: Callable[[], MultiModalityCausalLM] = lambda: model
        self._caches: Caches | None = None
        self._waiting: collections.deque[Generation] = collections.deque()
        self._rows: list[_Row] = []
        self._memory_bytes = self.limits.memory_bytes
        self._piece = PIECE if model.device.type == "cpu" else LARGEST_PIECE
        self._lock = threading.Lock()
        self._working = threading.Lock()
        self._worker: _Worker | None = None
        # Not on CPUs: an idle thread that holds OpenMP's threads slows down the parallel operations of others.
        self._keeps_thread = self.runs_ahead = model.device.type == "cuda"
        self._ahead: _Ahead | None = None
        _engines.add(self)

    @property
    def model(self) -> MultiModalityCausalLM:
        """The model that generates the answers."""
        return self._model()

    @property
    def positions(self) -> int:
        """How many tokens the model takes, prompt and answer together."""
        return self.model.config.language_config.max_position_embeddings

    def check_prompt(self, tokens: int) -> None:
        """Check that a prompt of this many tokens leaves room for an answer.

        Raises:
            PromptTooLongError: if it does not.
        """
        if tokens >= self.positions:
            raise PromptTooLongError(tokens, self.positions)

    @property
    def memory_bytes(self) -> int:
        """The budget for everything that grows, see `EngineLimits.memory_bytes`."""
        if self._memory_bytes is None:
            self._memory_bytes = default_memory(weight_bytes(self.model), free_memory(self.model.device))
        return self._memory_bytes

    def check_memory(self, generation: Generation) -> None:
        """Check that a generation fits into the memory budget on its own.

        Raises:
            MemoryBudgetError: if it does not.
        """
        needed = self._needed_bytes(generation)
        if needed > self.memory_bytes:
            answer = generation.max_tokens - generation.prompt_tokens
            raise MemoryBudgetError(
                f"The prompt of {generation.prompt_tokens} tokens and an answer of up to {answer} may take "
                f"{needed / 2**20:.1f} MiB of memory, and there are {self.memory_bytes / 2**20:.1f} for all; shorten "
                "the prompt, ask for fewer tokens, or raise the limit (--memory_mb)."
            )

    def _needed_bytes(self, generation: Generation) -> int:
        config, pixels = self.model.config.language_config, generation.inputs["pixel_values"]
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * self.model.dtype.itemsize
        return (generation.max_tokens + STEP) * per_token + (0 if pixels is None else pixels.nbytes)

    @property
    def waiting(self) -> int:
        """How many answers have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many answers are being generated."""
        return len(self._rows)

    @property
    def memory_used(self) -> int:
        """How many bytes of the budget are in use: set aside for running answers, or taken by caches."""
        caches = self._caches
        return sum(row.reserved_bytes for row in list(self._rows)) + (0 if caches is None else caches.nbytes)

    def compile(self, progress: Callable[[str], None] = logger.info) -> None:
        """Compile the decoding step, and on GPUs prompts and the vision towers too, with `torch.compile`.

        Later answers are faster, and the same up to rounding. Compilation takes less than a minute; PyTorch caches the
        code on disk. Move, cast, quantise or otherwise change the model before compiling, not after. The vision towers'
        blocks are compiled in the model itself, for whoever uses it.

        Args:
            progress: called with a line of text when compilation begins.

        Raises:
            ValueError: if the model is on several devices or one for which PyTorch does not compile, attends with
                another implementation than `sdpa`, has forward hooks, or has quantised weights on the CPU; or if there
                is no compiler.
        """
        self.use(compile_step(self.model, progress))

    def use(self, step: Step) -> None:
        """Replace `step` by another one, made for the model as it is now."""
        self._current_caches()  # first: if the weights have changed, this calls `step.forget`, for the old step only
        self.step = step

    def submit(self, generation: Generation) -> None:
        """Queue a generation, which begins as soon as there is room.

        Raises:
            RuntimeError: if the system cannot start a thread.
        """
        with self._lock:
            self._waiting.append(generation)
            if self._worker is not None:
                self._worker.calls.put(True)
                return
        try:
            _Worker(self).start()
        except RuntimeError:
            with self._lock:
                if generation in self._waiting:  # no other call's thread has taken it
                    self._waiting.remove(generation)
                    raise

    def cancel(self) -> None:
        """Cancel all answers; they end within one token, or one piece of a prompt."""
        with self._lock:
            for generation in (*self._waiting, *(row.generation for row in self._rows)):
                generation.cancelled.set()

    def close(self) -> None:
        """Cancel all answers, wait until they and the thread have ended, and free the caches."""
        self.cancel()
        with self._lock:
            worker, self._worker = self._worker, None
            if worker is not None:
                worker.calls.put(False)
        if worker is None:  # there is no thread, or it has not registered yet
            self._work()
        elif worker is not threading.current_thread():
            worker.join()
        self.forget()

    def forget(self) -> None:
        """Free the caches of earlier answers, and CUDA graphs. May be called from any thread.

        The engine notices changes of the model's weights that PyTorch counts. Call this after others (through `.data`,
        or by switching an adapter).
        """
        self._caches = None
        self.step.forget()

    def _employ(self, worker: "_Worker") -> bool:
        """Register a thread that has started; False if there is one already, because two answers came at once."""
        # The thread itself calls this, not `submit`, which Ctrl-C may interrupt while it waits for the start.
        with self._lock:
            if self._worker is not None:
                return False
            self._worker = worker
        if self._keeps_thread:  # otherwise it ends with its work, and must leave no finalizer behind
            weakref.finalize(self, worker.calls.put, False)
        return True

    @torch.inference_mode()
    def _work(self) -> None:
        """Generate answers until none is waiting or running."""
        with self._working, gpu_attention(self.model.device):
            while True:
                try:
                    self._admit()
                    self._drop_cancelled()
                    self._run_prompts()
                    self._step()
                except BaseException as error:  # raised again in every reader
                    for row in list(self._rows):
                        self._end(row, error)
                with self._lock:
                    if not self._waiting and not self._rows:
                        if not self._keeps_thread and self._worker is threading.current_thread():
                            self._worker = None
                        return

    def _admit(self) -> None:
        """Give waiting generations rows, in order, as long as there are rows and memory for all that they may need."""
        while len(self._rows) < self.limits.max_rows:
            with self._lock:  # `cancel` must find each generation in one of the two lists
                if not self._waiting:
                    return
                needed = self._needed_bytes(self._waiting[0])
                if self._rows and needed > self._unreserved():
                    return
                self._make_room(needed)
                self._rows.append(_Row(self._waiting.popleft(), needed))

    def _unreserved(self) -> int:
        return self.memory_bytes - sum(row.reserved_bytes for row in self._rows)

    def _make_room(self, needed: int = 0) -> None:
        """Limit the caches to the memory that is not set aside for rows, less `needed` bytes."""
        if (caches := self._caches) is not None:  # another thread may drop them meanwhile
            caches.limit(self._unreserved() - needed)

    def _drop_cancelled(self) -> None:
        for row in list(self._rows):
            if row.generation.cancelled.is_set():
                self._end(row)
        with self._lock:
            left = [generation for generation in self._waiting if generation.cancelled.is_set()]
            for generation in left:
                self._waiting.remove(generation)
        for generation in left:
            generation.end()

    def _run_prompts(self) -> None:
        """Run prompts in order of arrival, piece by piece, for about `prefill_seconds`."""
        begun = time.monotonic()
        while row := next((row for row in self._rows if not row.has_begun), None):
            try:
                self._run_piece(row)
            except BaseException as error:  # raised again in the reader
                self._end(row, error)
            self._drop_cancelled()
            if time.monotonic() - begun >= self.limits.prefill_seconds:
                return

    def _run_piece(self, row: _Row) -> None:
        """Encode some images of a prompt's next piece, or run it if it has all; after the last, choose a token."""
        if row.prompt is None:
            caches = self._current_caches()
            row.prompt, row.caches = Prompt.of(row.generation.inputs), weakref.ref(caches)
            row.cache = self._beginning(row, caches)
            row.generation.cached_tokens = row.cache.get_seq_length()
        model, start = self.model, row.cache.get_seq_length()
        left = len(row.prompt) - start
        end = start + math.ceil(left / math.ceil(left / self._piece))
        piece = row.prompt.part(start, end)
        if missing := [image for image in piece.images if image.key not in row.features]:
            count = 1 if model.device.type == "cpu" else IMAGES_AT_A_TIME
            caches = row.caches() or self._current_caches()  # another thread may have dropped them
            row.features |= caches.images.encode(model, missing[:count], row.generation.keeps)
            self._make_room()  # cached conversations give way to these images
            return
        begun = time.monotonic()

        def embed() -> torch.Tensor:
            features = torch.stack([row.features[image.key] for image in piece.images]) if piece.images else None
            return model.prepare_inputs_embeds(**piece.arguments(model.device), image_features=features)

        token_ids = None if piece.images else piece.input_ids.clamp(min=0).tolist()
        logits = self.step.prompt(model.language_model, embed, row.cache, token_ids)
        if end == len(row.prompt):
            row.features = None
            self._advance([row], logits.float())
        else:  # adapt the next pieces' size to the time they may take
            seconds = (time.monotonic() - begun) * self._piece / (end - start)
            is_fast = seconds < self.limits.prefill_seconds / 2
            self._piece = min(2 * self._piece, LARGEST_PIECE) if is_fast else max(self._piece // 2, PIECE)

    def _beginning(self, row: _Row, caches: Caches) -> RowCache:
        """A cache with a prefix of a row's prompt: from a row with the same prompt, or else from the prefix cache."""
        content = row.prompt.content[:-1]  # the last token has to run, for its logits
        for other in self._rows:
            same = other.has_begun and other.caches() is caches and np.array_equal(other.prompt.content[:-1], content)
            if same and len(content):
                return other.cache.prefix(len(content), room=STEP)
        return caches.prefixes.continued(content)

    def _step(self) -> None:
        """Add one token to every answer that has begun."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and (rows := [row for row in ahead.rows if row in self._rows]):
            numbers = [ahead.rows.index(row) for row in rows]
            self._advance(rows, ahead.logits if rows == ahead.rows else ahead.logits[numbers])
            return
        rows = [row for row in self._rows if row.has_begun]
        if not rows:
            return
        lengths = [row.cache.get_seq_length() for row in rows]
        try:
            logits = self._logits(rows)
        except Exception as failure:
            if len(rows) == 1 and not isinstance(failure, torch.OutOfMemoryError):
                self._end(rows[0], failure)
                return
            logger.warning("A step of %d answers failed: each goes on alone.", len(rows), exc_info=True)
            self.forget()  # it may have failed for lack of memory
            for row, length in zip(rows, lengths, strict=True):
                row.cache.truncate(length)
                try:
                    self._advance([row], self._logits([row]))
                except Exception as error:  # raised again in the reader
                    self._end(row, error)
        else:
            self._advance(rows, logits)

    def _logits(self, rows: Sequence[_Row], token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [rows, vocabulary] of the rows' next tokens.

        Args:
            token_ids: the rows' last tokens, int64 [rows] on the model's device, if the CPU does not have them yet.
        """
        if token_ids is None:
            token_ids = [row.generation.token_ids[-1] for row in rows]
        logits = self.step(self.model.language_model, token_ids, [row.cache for row in rows])
        return logits.to(torch.float32, copy=True)

    def _advance(self, rows: Sequence[_Row], logits: torch.Tensor) -> None:
        """Choose each row's next token. A GPU is waited for once for all rows, with the next step already launched."""
        likeliest, chosen = logits.argmax(-1), []
        for row, scores, token in zip(rows, logits, likeliest, strict=True):
            try:
                chosen.append((row, row.generation.choose(scores, token)))
            except Exception as error:  # raised again in the reader
                self._end(row, error)
        if not chosen:
            return
        token_ids = torch.stack([token for _, token in chosen])
        read = _start_reading(token_ids)
        if self.runs_ahead:
            self._run_ahead([row for row, _ in chosen], token_ids)
        for (row, _), token_id in zip(chosen, read(), strict=True):
            if not row.generation.advance(token_id):
                self._end(row)

    def _run_ahead(self, rows: list[_Row], token_ids: torch.Tensor) -> None:
        """Start the next step before its tokens are read, if it would run the same rows.

        For answers that turn out to have ended, its results are not used.
        """
        if rows != [row for row in self._rows if row.has_begun]:
            return
        lengths = [row.cache.get_seq_length() for row in rows]
        try:
            self._ahead = _Ahead(rows, self._logits(rows, token_ids))
        except Exception:
            logger.debug("A step failed ahead of its time.", exc_info=True)
            for row, length in zip(rows, lengths, strict=True):
                row.cache.truncate(length)

    def _end(self, row: _Row, error: BaseException | None = None) -> None:
        """Remove a row, and cache its keys and values for later prompts."""
        if self._ahead is not None and row in self._ahead.rows:  # the step ahead has run the answer's last token
            row.cache.truncate(row.cache.get_seq_length() - 1)
        row.reserved_bytes = 0  # from here on its keys and values count as cached
        self._make_room()
        try:
            if not row.generation.done.is_set():
                row.generation.end(error)
            if isinstance(error, torch.OutOfMemoryError):
                self.forget()
            elif row.cache is not None and row.generation.keeps:
                self._remember(row)
        finally:
            self._rows.remove(row)
            if not self._rows:
                self._ahead = None

    def _current_caches(self) -> Caches:
        """The caches for the model's present weights; new ones if the weights have changed."""
        caches = self._caches
        if caches is None or not caches.hold_for(self.model):
            self.step.forget()
            self._caches = caches = Caches(self.model, self.limits)
            self._make_room()
        return caches

    def _remember(self, row: _Row) -> None:
        """Cache a row's keys and values, unless it failed or the weights have changed since it began."""
        caches, generation, cache = row.caches(), row.generation, row.cache
        if generation.finish_reason is None or caches is None or not caches.hold_for(self.model):
            return
        length = cache.get_seq_length()  # without the last token, which never ran
        if not length:
            return
        content = np.concatenate([row.prompt.content, np.array(generation.token_ids, dtype=np.int64)])[:length]
        try:
            caches.prefixes.keep(content, cache)
        except RuntimeError:  # no memory left
            logger.warning("What was kept of earlier answers is dropped.", exc_info=True)
            self.forget()


def _start_reading(numbers: torch.Tensor) -> Callable[[], list[int]]:
    """Start to copy numbers to the CPU. The returned function waits for them, but not for later work of the device."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    on_cpu, copied = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record(torch.cuda.current_stream(numbers.device))

    def read() -> list[int]:
        copied.synchronize()
        return on_cpu.tolist()

    return read


class _Worker(threading.Thread):
    """An engine's thread. While idle it does not keep the engine alive, and ends with it.

    Attributes:
        calls: True to work once more, False to end.
    """

    def __init__(self, engine: Engine):
        super().__init__(name="deepseek_vl-generate", daemon=True)
        self.calls: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._engine = weakref.ref(engine)
        _workers.add(self)

    def run(self) -> None:
        engine = self._engine()
        if engine is None or not engine._employ(self):
            return
        while engine is not None:
            engine._work()
            if engine._worker is not self:
                return
            engine = None
            if self.calls.get():
                engine = self._engine()


def engine_of(model: MultiModalityCausalLM, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """The shared engine of a model, for callers that have no engine of their own.

    It is made on first use, and anew for another tokenizer. It does not keep the model alive, and is freed with it.
    """
    with _lock:
        engine = _engine_of.get(model)
        if engine is None or engine.tokenizer is not tokenizer:
            engine = _engine_of[model] = Engine(model, tokenizer)
            engine._model = weakref.ref(model)
        return engine


_lock = threading.Lock()
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_workers: weakref.WeakSet[_Worker] = weakref.WeakSet()
_engine_of: weakref.WeakKeyDictionary[MultiModalityCausalLM, Engine] = weakref.WeakKeyDictionary()


@atexit.register
def _close_all() -> None:
    """Close all engines, and wait for their threads.

    A thread may be the last that holds an engine which nobody else refers to. If the interpreter exited while PyTorch
    frees that engine's tensors, the process would abort.
    """
    for engine in list(_engines):
        engine.close()
    for worker in list(_workers):
        worker.calls.put(False)
        if worker.is_alive():
            worker.join()

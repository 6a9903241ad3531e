"""The engine: answers for many at once. Every door's text comes from here.

An `Engine` has one thread and one batch. A new request's prompt is run alone, its keys and values then join the
batch, and each step of the batch gives every answer one more token. An answer ends, fails or is stopped on its own.

What was computed for an answer is kept for a while: a later prompt runs only what follows its longest common beginning
with a conversation that was here, and no image is encoded twice. In float32 greedy answers are the same as from
nothing; in narrower types, as with batches, the order of sums can part two tokens that are almost equally likely.
"""

import atexit
import collections
import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from deepseek_vl.engine.decode_step import Step, compile_step
from deepseek_vl.engine.generation import Generation, PromptTooLongError
from deepseek_vl.engine.kv_cache import RowCache
from deepseek_vl.engine.limits import EngineLimits
from deepseek_vl.engine.prefix_cache import Caches
from deepseek_vl.engine.prompt import Prompt
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.models.modeling_vlm import CACHE

logger = logging.getLogger(__name__)


@dataclass
class _Row:
    """A place in the batch."""

    generation: Generation
    content: np.ndarray | None = None  # of its prompt, see `Prompt.content`
    caches: weakref.ref[Caches] | None = None  # which it began with; weak, so that what is forgotten is free at once


class Engine:
    """Generates the answers that are submitted, as many at a time as its limits say; the others wait in order.

    It has a thread only while there is work.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        limits: how much is done at a time, and kept; None for the defaults.

    Attributes:
        tokenizer, limits: as given.
        step: what computes one more token for every row.
    """

    def __init__(
        self, model: MultiModalityCausalLM, tokenizer: PreTrainedTokenizerBase, limits: EngineLimits | None = None
    ):
        self.tokenizer = tokenizer
        self.limits = limits or EngineLimits()
        self.step = Step()
        self._model: Callable[[], MultiModalityCausalLM] = lambda: model
        self._caches: Caches | None = None
        self._waiting: collections.deque[Generation] = collections.deque()
        self._rows: list[_Row] = []
        self._batch = RowCache()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        _engines.add(self)

    @property
    def model(self) -> MultiModalityCausalLM:
        """What answers."""
        return self._model()

    @property
    def positions(self) -> int:
        """How many tokens the model takes, prompt and answer together."""
        return self.model.config.language_config.max_position_embeddings

    def check_prompt(self, tokens: int) -> None:
        """Check that a prompt of so many tokens leaves room for an answer.

        Raises:
            PromptTooLongError: if it does not.
        """
        if tokens >= self.positions:
            raise PromptTooLongError(tokens, self.positions)

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
        """How many bytes are kept of answers that have ended: keys and values, and encoded images."""
        caches = self._caches
        return 0 if caches is None else caches.nbytes

    def compile(self, processor: VLChatProcessor, progress: Callable[[str], None] = logger.info) -> None:
        """Compile what the model runs for each token of an answer, and on GPUs its vision tower, by `torch.compile`.

        All answers from then on are faster, and the same up to rounding. It takes a minute or two; PyTorch keeps the
        code on the disk, for the next time. Move, cast, quantise or otherwise change the model before, not after.

        Args:
            processor: the model's.
            progress: gets a line of text whenever something begins.

        Raises:
            ValueError: if the model is on several devices or one for which PyTorch does not compile, attends with
                another implementation than `sdpa`, or has int8 weights on the CPU; or if there is no compiler.
        """
        self.use(compile_step(self.model, processor, progress))

    def use(self, step: Step) -> None:
        """Compute tokens with another step, which is ready for the model as it is now."""
        self._current_caches()  # before, as it lets a step forget what held for other weights
        self.step = step

    def submit(self, generation: Generation) -> None:
        """Begin a generation as soon as there is room."""
        with self._lock:
            self._waiting.append(generation)
            is_working = self._thread is not None
        if is_working:
            return
        try:
            threading.Thread(target=self._work, name="deepseek_vl-generate", daemon=True).start()
        except RuntimeError:  # the system gives no more threads
            with self._lock:
                if generation in self._waiting:  # no other's thread has taken it
                    self._waiting.remove(generation)
                    raise

    def cancel(self) -> None:
        """End everything within one token."""
        with self._lock:
            for generation in (*self._waiting, *(row.generation for row in self._rows)):
                generation.cancelled.set()

    def close(self) -> None:
        """Cancel everything, wait until it has ended, and free what was kept."""
        self.cancel()
        with self._lock:
            thread, left = self._thread, []
            if thread is None:  # or one that has not come to work yet
                left = list(self._waiting)
                self._waiting.clear()
        for generation in left:
            generation.end()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self.forget()

    def forget(self) -> None:
        """Free what was kept of earlier answers. May be called from any thread.

        Changes of the model's weights that torch counts are noticed without it; after others (through `.data`, by
        switching an adapter) call this.
        """
        self._caches = None
        self.step.forget()

    @torch.inference_mode()
    def _work(self) -> None:
        """The thread's body."""
        # Not before: Ctrl-C may come between a thread's creation and its start, or while its start is awaited.
        with self._lock:
            if self._thread is not None:
                return  # two answers came at once, and the other's thread is at work
            self._thread = threading.current_thread()
        while True:
            try:
                self._admit()
                self._release([row.generation.cancelled.is_set() for row in self._rows])
                if self._rows:
                    self._step()
                    continue
            except BaseException as error:  # raised again in every reader
                self._fail(error)
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return

    def _admit(self) -> None:
        """Give waiting generations a row while there is room, and run their prompts."""
        deadline = time.monotonic() + self.limits.prefill_seconds
        while self._waiting and len(self._rows) < self.limits.max_rows and time.monotonic() < deadline:
            with self._lock:  # `close` must find it in one place or the other
                row = _Row(self._waiting.popleft())
                self._rows.append(row)
            cache = None
            try:
                cache = self._prefill(row)
            except BaseException as error:  # raised again in the reader
                row.generation.end(error)
                if isinstance(error, torch.OutOfMemoryError):
                    self.forget()
            if cache is None:  # it has ended
                self._rows.pop()
            elif len(self._rows) == 1:
                self._batch = cache
            else:
                self._batch.append(cache)

    def _prefill(self, row: _Row) -> RowCache | None:
        """Run a prompt and choose the answer's first token; None if that is already the end."""
        generation, model = row.generation, self.model
        if generation.cancelled.is_set():
            generation.end()
            return None
        caches = self._current_caches()
        prompt = Prompt.of(generation.inputs)
        row.content, row.caches = prompt.content, weakref.ref(caches)
        cache = caches.prefixes.continued(prompt.content[:-1])  # the last token's logits are wanted
        generation.cached_tokens = cache.get_seq_length()
        rest = prompt.after(generation.cached_tokens)
        inputs_embeds = model.prepare_inputs_embeds(
            **rest.arguments(), image_features=caches.images.encode(model, rest.images) if rest.images else None
        )
        if generation.cancelled.is_set():  # while the images were encoded
            generation.end()
            return None
        output = model.language_model(inputs_embeds=inputs_embeds, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        cache.lengths = [len(prompt)]
        if generation.advance(output.logits[0, -1].float()):
            return cache
        self._remember(row, cache)
        return None

    def _step(self) -> None:
        """One more token for every row."""
        generations = [row.generation for row in self._rows]
        token_ids = [generation.token_ids[-1] for generation in generations]
        logits = self.step(self.model.language_model, token_ids, self._batch).float()
        self._release([not generation.advance(row) for generation, row in zip(generations, logits, strict=True)])

    def _release(self, has_ended: list[bool]) -> None:
        """Let go of the rows that have ended, and remember what they leave."""
        if not any(has_ended):
            return
        for index, (row, is_over) in enumerate(zip(self._rows, has_ended, strict=True)):
            if is_over:
                if not row.generation.done.is_set():
                    row.generation.end()
                self._remember(row, self._batch, index)
        kept = [index for index, is_over in enumerate(has_ended) if not is_over]
        self._rows = [self._rows[index] for index in kept]
        if kept:
            self._batch.keep(kept)
        else:
            self._batch = RowCache()

    def _fail(self, error: BaseException) -> None:
        """End all rows with an error, after which their keys and values may be of any state."""
        for row in self._rows:
            if not row.generation.done.is_set():
                row.generation.end(error)
        self._rows, self._batch = [], RowCache()
        self.forget()

    def _current_caches(self) -> Caches:
        """What is kept of the model as it is now."""
        caches = self._caches
        if caches is None or not caches.hold_for(self.model):
            self.step.forget()
            self._caches = caches = Caches(self.model, self.limits)
        return caches

    def _remember(self, row: _Row, cache: RowCache, index: int = 0) -> None:
        """Keep what a generation that has ended leaves in a row of a cache, unless the weights have changed since.

        If it is the cache's only row, then the cache is given away.
        """
        caches, generation = row.caches(), row.generation
        if generation.finish_reason is None or caches is None or not caches.hold_for(self.model):
            return
        length = cache.lengths[index]  # without the last token, which never ran
        content = np.concatenate([row.content, np.array(generation.token_ids, dtype=np.int64)])[:length]
        is_given = len(cache.lengths) == 1 and not cache.is_borrowed
        try:
            caches.prefixes.keep(content, cache if is_given else cache.prefix(index, length))
        except RuntimeError:  # no memory left
            logger.warning("What was kept of earlier answers is dropped.", exc_info=True)
            self.forget()


def engine_of(model: MultiModalityCausalLM, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """The engine that callers share who have only a model: made when first asked for, or for another tokenizer.

    It goes with the model, and does not keep it.
    """
    with _lock:
        engine = _engine_of.get(model)
        if engine is None or engine.tokenizer is not tokenizer:
            engine = _engine_of[model] = Engine(model, tokenizer)
            engine._model = weakref.ref(model)
        return engine


_lock = threading.Lock()
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_engine_of: weakref.WeakKeyDictionary[MultiModalityCausalLM, Engine] = weakref.WeakKeyDictionary()


@atexit.register
def _close_all() -> None:
    """The interpreter must not end below a thread that computes."""
    for engine in list(_engines):
        engine.close()

"""The engine: answers for many at once. Every front-end's text comes from here.

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

import torch

from deepseek_vl.engine.decode_step import Step
from deepseek_vl.engine.generation import Generation
from deepseek_vl.engine.kv_cache import RowCache
from deepseek_vl.engine.prefix_cache import Memory
from deepseek_vl.engine.prompt import Prompt
from deepseek_vl.models import MultiModalityCausalLM

logger = logging.getLogger(__name__)

PREFILL_SECONDS = 0.2
"""Prompts are run for so long at most (but one at least) before running answers get their next token."""


class Engine:
    """Generates the answers that are submitted, up to `max_rows` at a time; the others wait in order.

    It has a thread only while there is work.

    Args:
        max_rows: how many answers make up the batch at most.
        memory_bytes: how much memory the keys and values of conversations that have ended may take, on the model's
            device; None for `conversation_bytes` of the model, 0 to keep none.

    Attributes:
        step: what computes one more token for every row.
    """

    def __init__(self, max_rows: int = 16, memory_bytes: int | None = None):
        self.max_rows = max_rows
        self.memory_bytes = memory_bytes
        self.step = Step()
        self._memory: Memory | None = None
        self._waiting: collections.deque[Generation] = collections.deque()
        self._rows: list[Generation] = []
        self._cache = RowCache()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        _engines.add(self)

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
        memory = self._memory
        return 0 if memory is None else memory.conversations.nbytes + memory.images.nbytes

    def use(self, step: Step, model: MultiModalityCausalLM) -> None:
        """Compute tokens with another step, which is ready for this model as it is now."""
        self._memory_of(model)  # before, as it lets a step forget what held for other weights
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
            for generation in (*self._waiting, *self._rows):
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
        self._memory = None
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
                self._keep([not generation.cancelled.is_set() for generation in self._rows])
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
        """Run waiting prompts while there is room for them."""
        deadline = time.monotonic() + PREFILL_SECONDS
        while self._waiting and len(self._rows) < self.max_rows and time.monotonic() < deadline:
            with self._lock:  # `close` must find it in one place or the other
                generation = self._waiting.popleft()
                self._rows.append(generation)
            cache = None
            try:
                cache = self._prefill(generation)
            except BaseException as error:  # raised again in the reader
                generation.end(error)
                if isinstance(error, torch.OutOfMemoryError):
                    self.forget()
            if cache is None:  # it has ended
                self._rows.pop()
            elif len(self._rows) == 1:
                self._cache = cache
            else:
                self._cache.append(cache)

    def _prefill(self, generation: Generation) -> RowCache | None:
        """Run a prompt and choose the answer's first token; None if that is already the end."""
        if generation.cancelled.is_set():
            generation.end()
            return None
        model, memory = generation.model, self._memory_of(generation.model)
        prompt = Prompt.of(generation.inputs)
        generation.begin(prompt, memory)
        cache = memory.conversations.continued(prompt.content[:-1])  # the last token's logits are wanted
        generation.cached_tokens = cache.get_seq_length()
        rest = prompt.after(generation.cached_tokens)
        inputs_embeds = model.prepare_inputs_embeds(
            **rest.arguments(), image_features=memory.images.encode(model, rest.images) if rest.images else None
        )
        if generation.cancelled.is_set():  # while the images were encoded
            generation.end()
            return None
        output = model.language_model(
            inputs_embeds=inputs_embeds, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache.lengths = [len(prompt)]
        token_id = generation.choose(output.logits[0, -1].float())
        if generation.take(token_id):
            return cache
        self._remember(generation, cache)
        return None

    def _memory_of(self, model: MultiModalityCausalLM) -> Memory:
        """What is kept of this model as it is now."""
        memory = self._memory
        if memory is None or not memory.holds_for(model):
            self.step.forget()
            self._memory = memory = Memory(model, self.memory_bytes)
        return memory

    def _remember(self, generation: Generation, cache: RowCache, row: int = 0) -> None:
        """Keep what a generation that has ended leaves in a row of a cache."""
        try:
            generation.remember(cache, row)
        except RuntimeError:  # no memory left
            logger.warning("What was kept of earlier answers is dropped.", exc_info=True)
            self.forget()

    def _step(self) -> None:
        """One more token for every row."""
        rows = self._rows
        token_ids = [generation.text.token_ids[-1] for generation in rows]
        logits = self.step(rows[0].model.language_model, token_ids, self._cache).float()
        self._keep([_advance(row, row_logits) for row, row_logits in zip(rows, logits, strict=True)])

    def _fail(self, error: BaseException) -> None:
        """End all rows with an error, after which their keys and values may be of any state."""
        for generation in self._rows:
            if not generation.done.is_set():
                generation.end(error)
        self._rows, self._cache = [], RowCache()
        self.forget()

    def _keep(self, goes_on: list[bool]) -> None:
        """Let go of the rows that do not go on."""
        if all(goes_on):
            return
        for row, (generation, stays) in enumerate(zip(self._rows, goes_on, strict=True)):
            if stays:
                continue
            if not generation.done.is_set():
                generation.end()
            self._remember(generation, self._cache, row)
        kept = [i for i, stays in enumerate(goes_on) if stays]
        self._rows = [self._rows[i] for i in kept]
        if kept:
            self._cache.keep(kept)
        else:
            self._cache = RowCache()


def _advance(generation: Generation, logits: torch.Tensor) -> bool:
    """Choose and take one more token; returns whether there are to be more. An error is this generation's alone."""
    try:
        return generation.take(generation.choose(logits))
    except Exception as error:  # raised again in the reader
        generation.end(error)
        return False


def engine_of(model: MultiModalityCausalLM) -> Engine:
    """The one engine of a model, which all that generate with it share."""
    with _lock:
        if model not in _engine_of:
            _engine_of[model] = Engine()
        return _engine_of[model]


_lock = threading.Lock()
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_engine_of: weakref.WeakKeyDictionary[MultiModalityCausalLM, Engine] = weakref.WeakKeyDictionary()


@atexit.register
def _close_all() -> None:
    """The interpreter must not end below a thread that computes."""
    for engine in list(_engines):
        engine.close()

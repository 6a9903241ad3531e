"""An answer while it is generated (`Generation`), and its text as a stream (`AnswerStream`)."""

import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from deepseek_vl.engine.detokenizer import Detokenizer
from deepseek_vl.engine.sampling import TokenLogprobs, sample, token_logprobs
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.engine.structured import Structure
from deepseek_vl.kernels.threads import release_threads
from deepseek_vl.models.processing_vlm import BatchedVLChatProcessorOutput

if TYPE_CHECKING:
    from deepseek_vl.engine.engine import Engine

logger = logging.getLogger(__name__)

END = object()
"""The last item that a generation's sink gets."""


class PromptTooLongError(ValueError):
    """A prompt leaves the model no room for an answer.

    Attributes:
        tokens: length of the prompt.
        positions: how many tokens the model takes, prompt and answer together.
    """

    def __init__(self, tokens: int, positions: int):
        super().__init__(
            f"The prompt has {tokens} tokens and the model {positions} positions, which leaves no room for an answer; "
            "shorten the text or use fewer images."
        )
        self.tokens = tokens
        self.positions = positions


class MemoryBudgetError(ValueError):
    """A prompt and its answer may take more memory than there is for all answers."""


class Generation:
    """An answer while it is generated, for `Engine.submit`.

    Args:
        engine: will generate the answer.
        inputs: the processor's output for one conversation, best on the CPU: the engine moves only what the model
            computes with.
        settings: see `GenerationSettings`.
        sink: gets pieces of text; then an exception, if there was one; then `END`. Called in the engine's thread; if it
            raises, the answer ends.
        keeps: whether its keys, values and image features are cached for later prompts.
        goes_on: whether the answer continues a text that the prompt ends with. Otherwise a structured answer begins
            with the space after the template's "Assistant:", which the sink does not get.

    Attributes:
        model: the engine's model, which this reference keeps alive.
        prompt_tokens: length of the prompt.
        max_tokens: the most tokens of prompt and answer together.
        cached_tokens: how many of the prompt's tokens did not run, because their keys and values were cached.
        cancelled: set it to end the answer within one token.
        logprobs: log probabilities of the tokens so far, if the settings ask for them.
        dropped: how many characters at the beginning of the answer the sink did not get.
        done: set when the answer has ended.
        finish_reason: `stop` (end token, stop word, or a structured answer that is complete), `length` or `cancelled`;
            None while it runs or after an error.

    Raises:
        ValueError: if `inputs` has several rows.
        PromptTooLongError: if its prompt leaves no room for an answer.
        MemoryBudgetError: if it may need more memory than the engine's whole budget.
        StructureError: if the form of the answer is not supported.
    """

    def __init__(
        self,
        engine: "Engine",
        inputs: BatchedVLChatProcessorOutput,
        settings: GenerationSettings,
        sink: Callable[[Any], None],
        keeps: bool = True,
        goes_on: bool = False,
    ):
        self.model = engine.model
        rows, self.prompt_tokens = inputs["input_ids"].shape
        if rows != 1:
            raise ValueError(f"An answer stream takes one conversation, got a batch of {rows}.")
        engine.check_prompt(self.prompt_tokens)
        self.inputs = inputs
        self.keeps = keeps
        self.cached_tokens = 0
        self.cancelled = threading.Event()
        self.done = threading.Event()
        self.finish_reason: str | None = None
        self._settings = settings
        self._sink = sink
        self._detokenizer = Detokenizer(engine.tokenizer, settings.stop)
        self._end_token = engine.tokenizer.eos_token_id
        self._max_new_tokens = min(settings.max_new_tokens, engine.positions - self.prompt_tokens)
        self.max_tokens = self.prompt_tokens + self._max_new_tokens
        engine.check_memory(self)
        self.logprobs: list[TokenLogprobs] = []
        self._structure: Structure | None = None
        if settings.structured is not None:
            vocabulary = self.model.config.language_config.vocab_size
            self._structure = Structure(engine.tokenizer, vocabulary, settings.structured, after_space=not goes_on)
        self._drops_space = self._structure is not None and not goes_on
        self.dropped = 0
        self._logits: torch.Tensor | None = None
        self._generator: torch.Generator | None = None
        if settings.seed is not None and not settings.greedy:
            self._generator = torch.Generator(self.model.device).manual_seed(settings.seed)
        release_threads()  # this thread has processed the inputs; now the engine's thread needs the cores

    @property
    def token_ids(self) -> list[int]:
        """The answer's tokens so far."""
        return self._detokenizer.token_ids

    def choose(self, logits: torch.Tensor, likeliest: torch.Tensor) -> torch.Tensor:
        """Choose the next token, int64 [], on the logits' device.

        Args:
            logits: float32 [vocabulary].
            likeliest: the token with the largest logit, int64 [].
        """
        if self._settings.logprobs is not None:
            self._logits = logits
        if self._structure is not None:
            logits = self._structure.masked(logits)
            likeliest = logits.argmax(-1)
        return likeliest if self._settings.greedy else sample(logits, self._settings, self._generator, self.token_ids)

    def advance(self, token_id: int) -> bool:
        """Add the next token, and pass its text on. An error in either ends the answer.

        Returns:
            whether the answer goes on.
        """
        try:
            if self._logits is not None:
                self.logprobs.append(token_logprobs(self._logits, token_id, self._settings.logprobs or 0))
                self._logits = None
            if self._structure is not None:
                self._structure.accept(token_id)
            self._pass_on(self._detokenizer.feed(token_id))
        except Exception as error:  # raised again in the reader
            self.end(error)
            return False
        is_whole = self._structure is not None and self._structure.is_whole
        if self._detokenizer.stopped or token_id == self._end_token or is_whole:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self._max_new_tokens:
            self.finish_reason = "length"
        else:
            return True
        self.end()
        return False

    def end(self, error: BaseException | None = None) -> None:
        """End the generation: finished, cancelled, or failed with an error."""
        if error is None:
            try:
                rest = self._detokenizer.flush()
                self.finish_reason = self.finish_reason or "cancelled"
                self._pass_on(rest)
            except Exception as failure:  # raised again in the reader
                error, self.finish_reason = failure, None
        if error is not None:
            self._tell(error)
        self.done.set()
        self._tell(END)

    def _pass_on(self, text: str) -> None:
        if text and self._drops_space:
            self._drops_space, whole, text = False, text, text.removeprefix(" ")
            self.dropped = len(whole) - len(text)
        if text:
            self._sink(text)

    def _tell(self, end: Any) -> None:
        try:
            self._sink(end)
        except Exception:
            logger.exception("An answer has ended, and nobody can be told.")


class AnswerStream(Iterator[str]):
    """Iterates over the pieces of an answer while it is generated; also a context manager that stops it at the end.

    Generation begins when the first piece is asked for. The pieces joined are the answer, without special tokens and
    stop words.

    Takes and raises what `Generation` does. Errors during generation are raised by the iteration.
    """

    def __init__(self, engine: "Engine", inputs: BatchedVLChatProcessorOutput, settings: GenerationSettings):
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._generation = Generation(engine, inputs, settings, self._queue.put)
        self._engine = engine
        self._begun = self._ended = False
        weakref.finalize(self, self._generation.cancelled.set)

    @property
    def prompt_tokens(self) -> int:
        """The length of the prompt."""
        return self._generation.prompt_tokens

    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length` or `cancelled`, as in `Generation`; None while it runs or after an error."""
        return self._generation.finish_reason

    @property
    def completion_tokens(self) -> int:
        """How many tokens were generated so far."""
        return len(self._generation.token_ids)

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Log probabilities of the tokens so far, if the settings ask for them."""
        return self._generation.logprobs

    def stop(self) -> None:
        """End the generation within one token. May be called from any thread; the iteration then ends."""
        self._generation.cancelled.set()

    def close(self) -> None:
        """Stop, and wait until the generation has ended."""
        self.stop()
        self._ended = True
        if self._begun:
            self._generation.done.wait()

    def __next__(self) -> str:
        if self._ended:
            raise StopIteration
        if not self._begun:
            self._engine.submit(self._generation)
            self._begun = True
        item = self._queue.get()
        if isinstance(item, str):
            return item
        self._ended = True
        if item is END:
            raise StopIteration
        raise item

    def __enter__(self) -> "AnswerStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

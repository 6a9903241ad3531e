"""An answer as a stream of text."""

import queue
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase

from deepseek_vl.engine.engine import engine_of
from deepseek_vl.engine.generation import END, Generation
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.models.processing_vlm import BatchedVLChatProcessorOutput


def as_stop_words(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop words as templates and callers give them: none, one or several."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


class AnswerStream(Iterator[str]):
    """Iterates over the pieces of an answer while it is generated; also a context manager that stops it at the end.

    Generation begins with the first piece asked for. The pieces joined are the answer, without special tokens and stop
    words.

    Takes and raises what `Generation` does; what goes wrong during generation is raised by the iteration.
    """

    def __init__(
        self,
        model: MultiModalityCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        inputs: BatchedVLChatProcessorOutput,
        settings: GenerationSettings,
    ):
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._generation = Generation(model, tokenizer, inputs, settings, self._queue.put)
        self._engine = engine_of(model)
        self._begun = self._ended = False
        weakref.finalize(self, self._generation.cancelled.set)

    @property
    def prompt_tokens(self) -> int:
        """The length of the prompt."""
        return self._generation.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        """How many of the prompt's tokens did not run, because an earlier answer had left them."""
        return self._generation.cached_tokens

    @property
    def finish_reason(self) -> str | None:
        """`stop` (end token or stop word), `length`, `cancelled`; None while it runs or after an error."""
        return self._generation.finish_reason

    @property
    def completion_tokens(self) -> int:
        """How many tokens were generated so far."""
        return len(self._generation.text.token_ids)

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

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def message_images(messages: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
    """The PIL images of messages (`{"role", "content", "images"}`), in reading order."""
    return [image for message in messages for image in message.get("images") or ()]


def stream_answer(
    model: MultiModalityCausalLM,
    processor: VLChatProcessor,
    messages: Sequence[Mapping[str, Any]],
    settings: GenerationSettings,
) -> AnswerStream:
    """Stream the answer to a conversation.

    Args:
        messages: `{"role", "content", "images"}`, `images` holding PIL images, one per tag in the contents. The last is
            the assistant's, with an empty content.

    Raises:
        ValueError: if images and tags do not match, or the prompt is too long.
    """
    inputs = processor(conversations=messages, images=message_images(messages)).to(model.device, dtype=model.dtype)
    return AnswerStream(model, processor.tokenizer, inputs, settings)

"""Ask one question about many pictures. A few are read ahead, so that the engine's batch stays full."""

import functools
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from deepseek_vl.engine.chat import with_image_tags
from deepseek_vl.engine.engine import Engine, engine_of
from deepseek_vl.engine.generation import END, Generation
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.imaging.open import load_image
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.models.processing_vlm import BatchedVLChatProcessorOutput

READERS = 2
"""How many pictures are opened at a time, each by a thread of its own."""

READ_AHEAD = 4
"""How many pictures are open, or being opened, beyond those that the engine answers."""


@dataclass(frozen=True)
class Caption:
    """What the model says of a picture.

    Attributes:
        text: the answer, without white space around it.
        prompt_tokens, completion_tokens: how many tokens the prompt and the answer have.
        finish_reason: `stop`, or `length` if the answer was cut.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str


class Question:
    """The question that is asked about every picture.

    Args:
        engine: the one that answers.
        processor: the model's.
        prompt: the question, with an image tag where the picture belongs, which otherwise is in front. Other special
            tokens in it are ordinary text.
        settings: how answers are generated; the conversation template's stop words are added.

    Raises:
        ValueError: for a prompt with several image tags, or too long for the model.
    """

    def __init__(self, engine: Engine, processor: VLChatProcessor, prompt: str, settings: GenerationSettings):
        self.settings = settings.with_stop_words(processor.new_chat_template().stop_str)
        messages = [
            {"role": "User", "content": with_image_tags(prompt, 1, processor.image_tag)},
            {"role": "Assistant", "content": ""},
        ]
        self._prompt = processor.render(messages, untrusted=True)
        self._ids, _ = processor.encode(self._prompt)
        engine.check_prompt(processor.count_tokens(self._prompt, self._ids))
        self._engine = engine
        self._processor = processor

    def about(self, image: Image.Image) -> BatchedVLChatProcessorOutput:
        """The question about one picture, as the engine takes it."""
        inputs = self._processor(prompt=self._prompt, ids=self._ids, images=[image])
        return inputs.to("cpu", dtype=self._engine.model.dtype)  # the engine moves what it computes with


def caption_many(
    model: MultiModalityCausalLM,
    processor: VLChatProcessor,
    images: Iterable[Any],
    prompt: str,
    settings: GenerationSettings | None = None,
    engine: Engine | None = None,
    open_image: Callable[[Any], Image.Image] = load_image,
) -> Iterator[tuple[int, Caption | OSError | ValueError]]:
    """Ask one question about many pictures; answers come as they are ready, in any order.

    Memory does not grow with the number of pictures: `images` is read only a few ahead of the answers, and only
    the beginning that all prompts share is kept.

    Args:
        images: what `open_image` takes: by default paths, bytes, files or PIL images; may be a generator.
        prompt: see `Question`.
        settings: see `GenerationSettings`; None for greedy answers of up to 512 tokens.
        engine: of this model; None for the one that `stream_answer` uses.
        open_image: opens one picture, in one of several threads.

    Yields:
        The number of a picture, counted from 0, and its caption, or the error that opening it raised.

    Raises:
        ValueError: for a prompt that does not fit; raised by the call itself.
        Exception: whatever the engine or `images` raises; the iteration raises it, and ends.
    """
    engine = engine or engine_of(model, processor.tokenizer)
    question = Question(engine, processor, prompt, settings or GenerationSettings())
    return _Asking(engine, question, open_image).answers(images)


class _Asking:
    """One run of `caption_many`."""

    def __init__(self, engine: Engine, question: Question, open_image: Callable[[Any], Image.Image]):
        self._engine = engine
        self._question = question
        self._open_image = open_image
        self._ended: queue.SimpleQueue[tuple[int, Any, bool]] = queue.SimpleQueue()
        self._running: dict[int, Generation] = {}
        self._is_first = itertools.chain([True], itertools.repeat(False))
        self._stopped = threading.Event()

    def answers(self, images: Iterable[Any]) -> Iterator[tuple[int, Caption | OSError | ValueError]]:
        numbered = enumerate(images)
        most, pending = self._engine.limits.max_rows + READ_AHEAD, 0
        readers = ThreadPoolExecutor(READERS, thread_name_prefix="deepseek_vl-read")
        try:
            while True:
                # Answers that are ready come first: `images` may take long to give the next picture.
                while pending < most and self._ended.empty() and (item := next(numbered, None)) is not None:
                    readers.submit(self._begin, *item)
                    pending += 1
                if not pending:
                    return
                index, answer, is_fatal = self._ended.get()
                pending -= 1
                self._running.pop(index, None)
                if is_fatal:
                    raise answer
                yield index, answer
        finally:
            self._stopped.set()
            readers.shutdown(cancel_futures=True)
            for generation in list(self._running.values()):
                generation.cancelled.set()
            for generation in list(self._running.values()):
                generation.done.wait()

    def _begin(self, index: int, source: Any) -> None:
        """Open a picture and give it to the engine."""
        if self._stopped.is_set():
            return
        try:
            inputs = self._question.about(self._open_image(source))
        except (OSError, ValueError) as error:
            self._ended.put((index, error, False))
            return
        except BaseException as error:  # raised again in the reader
            self._ended.put((index, error, True))
            return
        sink = functools.partial(self._take, index, [])
        try:
            # All prompts begin alike: the first one's keys and values are kept for the others, whose own are not kept.
            generation = Generation(self._engine, inputs, self._question.settings, sink, keeps=next(self._is_first))
            self._running[index] = generation
            self._engine.submit(generation)
        except BaseException as error:  # raised again in the reader
            self._running.pop(index, None)
            self._ended.put((index, error, True))

    def _take(self, index: int, items: list[Any], item: Any) -> None:
        """Collect one generation's pieces.

        It holds no reference to the generation: a cycle would keep that in memory for a while.
        """
        if item is not END:
            items.append(item)
        elif items and isinstance(items[-1], BaseException):
            self._ended.put((index, items[-1], True))
        else:
            generation = self._running[index]
            counts = generation.prompt_tokens, len(generation.token_ids)
            self._ended.put((index, Caption("".join(items).strip(), *counts, generation.finish_reason or ""), False))

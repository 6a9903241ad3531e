"""A server's model, and what a request needs from it: a place in the queue, a prompt, pictures, generations."""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
from PIL import Image

from deepseek_vl.engine.detokenizer import TokenBytes
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.generation import Generation, MemoryBudgetError, PromptTooLongError
from deepseek_vl.engine.limits import RequestLimits
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.engine.structured import StructureError
from deepseek_vl.imaging.open import ImageLoadError, ImageTooLargeError, data_url_bytes
from deepseek_vl.imaging.worker import PictureClient, PictureDecoder
from deepseek_vl.models import VLChatProcessor
from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.api.fetch import ImageFetcher
from deepseek_vl.serve.api.messages import Conversation
from deepseek_vl.serve.api.metrics import Metrics
from deepseek_vl.utils.conversation import Rendered


@dataclass
class Service:
    """A model's engine and how it is served.

    Attributes:
        name: what clients call the model.
        engine, processor: the model's.
        settings: how answers are generated where a request does not say.
        key: the bearer token that clients must have; None for no such need.
        names: those that the server answers to, see `names_of`; None for all.
        limits, fetcher: see `RequestLimits` and `ImageFetcher`.
        origins: those of pages in browsers that may ask, besides the server's own.
        places_taken: how many of the places that `place` gives are taken.
        preparing: a semaphore that limits how many requests are prepared whose prompts have not run.
        bodies_bytes: the size of all bodies that are held.
        seconds_in_place: how long the latest requests held their places, on average.
    """

    name: str
    engine: Engine
    processor: VLChatProcessor
    settings: GenerationSettings
    key: str | None = None
    names: frozenset[str] | None = None
    limits: RequestLimits = field(default_factory=RequestLimits)
    fetcher: ImageFetcher = field(default_factory=ImageFetcher)
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    origins: Sequence[str] = ()
    places_taken: int = 0
    bodies_bytes: int = 0
    seconds_in_place: float = 0.0

    def __post_init__(self) -> None:
        self._is_closing = False
        self.token_bytes = TokenBytes(self.processor.tokenizer)
        # Longer texts fill more than all positions, as no token has more characters than its name.
        self._most_characters = self.engine.positions * max(map(len, self.processor.tokenizer.get_vocab()))
        self.preparing = asyncio.Semaphore(self.limits.prepared)
        self.decoder = PictureDecoder(self.limits.pictures, self.limits.decoders)
        self._decoding = anyio.CapacityLimiter(self.limits.decoders)  # so that waiting requests take no thread

    def cancel(self) -> None:
        """Cancel every answer, and refuse new ones."""
        self._is_closing = True
        self.engine.cancel()

    def check_open(self) -> None:
        """Check that the server takes requests.

        Raises:
            APIError: if it is shutting down.
        """
        if self._is_closing:
            raise APIError("The server is shutting down.", status=503)

    @contextlib.contextmanager
    def place(self, count: int = 1) -> Iterator[None]:
        """Hold places for `count` answers in the batch or in the queue for it.

        Raises:
            APIError: if none is free. Its `Retry-After` estimates when one will be.
        """
        if self.places_taken >= self.engine.limits.max_rows + self.limits.waiting:
            raise APIError(
                "Too many requests are waiting; try again.",
                status=429,
                headers={"Retry-After": str(max(1, math.ceil(self.seconds_in_place / self.places_taken)))},
            )
        self.places_taken += count
        begun = time.monotonic()
        try:
            yield
        finally:
            self.places_taken -= count
            seconds = time.monotonic() - begun
            self.seconds_in_place += (seconds - self.seconds_in_place) * (0.1 if self.seconds_in_place else 1)

    def check_images(self, urls: Sequence[str], field: str) -> None:
        """Check the number of a request's images.

        Raises:
            APIError: for too many.
        """
        if len(urls) > self.limits.images:
            raise APIError(f"The request has {len(urls)} images; at most {self.limits.images} are taken.", field)

    async def images_of(self, urls: Sequence[str], field: str) -> list[Image.Image]:
        """Fetch and decode pictures.

        Args:
            field: the one of the request that has them.

        Raises:
            APIError: for too many, one that cannot be fetched or read, or if all of them take too long.
        """
        self.check_images(urls, field)
        client = self.decoder.client()
        try:
            async with asyncio.timeout(self.limits.images_seconds):
                return [await self._image(client, number, url, field) for number, url in enumerate(urls, 1)]
        except TimeoutError as error:
            message = (
                f"The images cannot be read within {self.limits.images_seconds:g} seconds; send fewer or smaller ones."
            )
            raise APIError(message, field, "images_too_slow", 503, {"Retry-After": "10"}) from error
        finally:
            client.leave()  # gives up a picture that is being decoded when the client has gone

    async def _image(self, client: PictureClient, number: int, url: str, field: str) -> Image.Image:
        try:
            fetched = None if url[:5].lower() == "data:" else await self.fetcher.fetch(url)
        except APIError as error:
            error.param = field
            raise

        def decode() -> Image.Image:
            return client.decode(
                data_url_bytes(url) if fetched is None else fetched, self.processor.image_processor.square
            )

        limits = self.limits.pictures
        try:
            return await anyio.to_thread.run_sync(decode, limiter=self._decoding, abandon_on_cancel=True)
        except ImageTooLargeError as error:
            message = (
                f"Image {number} has more than {limits.pixels} pixels, a side longer than {limits.side} or over "
                f"{limits.aspect} times the other, or takes too much memory."
            )
            raise APIError(message, field, "invalid_image") from error
        except ImageLoadError as error:
            kinds = ", ".join(limits.formats)
            message = (
                f"Image {number} cannot be read: it must be a whole {kinds} picture that is decoded within "
                f"{limits.seconds:g} seconds, here as a base64 data URL."
            )
            raise APIError(message, field, "invalid_image") from error

    def prompt_of(self, conversation: Conversation, field: str) -> Rendered:
        """A conversation's prompt; special tokens in what clients wrote are ordinary text.

        Args:
            field: the one of the request that has the messages.

        Raises:
            APIError: if it is too long to be tokenized.
        """
        prompt = self.processor.render(conversation.messages, untrusted=True)
        self.check_text(prompt.text, field)
        if conversation.unfinished is None:
            return prompt
        return replace(prompt, text=prompt.text[: prompt.literal[-1][1]])  # without what ends the message

    def question(self, conversation: Conversation, settings: GenerationSettings, count: int, field: str) -> "Question":
        """Make a question of a conversation.

        Args:
            settings: how to answer; the template's stop words are added.
            count: how many answers.
            field: the one of the request that has the messages.

        Raises:
            APIError: if it is too long.
        """
        prompt = self.prompt_of(conversation, field)
        ids, _ = self.processor.encode(prompt)
        self.check_length(self.processor.count_tokens(prompt, ids), field)  # before any picture is decoded
        settings = settings.with_stop_words(self.processor.new_chat_template().stop_str)
        unfinished = conversation.unfinished
        goes_on = unfinished is not None and unfinished == unfinished.rstrip()
        return Question(prompt.text, ids, conversation.urls, settings, field, count, goes_on)

    def check_text(self, text: str, field: str) -> None:
        """Check that a text is short enough to be tokenized, which takes long.

        Raises:
            APIError: if it has more tokens than the model has positions, however it is tokenized.
        """
        if len(text) > self._most_characters:
            message = (
                f"The prompt has {len(text)} characters, too many for the {self.engine.positions} positions that it "
                "and the answer share."
            )
            raise APIError(message, field, "context_length_exceeded")

    def check_length(self, tokens: int, field: str) -> None:
        """Check that a prompt of so many tokens leaves room for an answer.

        Raises:
            APIError: if it does not.
        """
        try:
            self.engine.check_prompt(tokens)
        except PromptTooLongError as error:
            message = f"The prompt has {error.tokens} tokens; it and the answer share {error.positions} positions."
            raise APIError(message, field, "context_length_exceeded") from error

    def generations(
        self, question: "Question", images: Sequence[Image.Image], sinks: Sequence[Callable[[Any], None]]
    ) -> list[Generation]:
        """One generation per sink for a question. The later ones reuse the first one's prompt.

        Raises:
            APIError: if there is not enough memory, or for a form of answers that is not supported.
        """
        inputs = self.processor(prompt=question.prompt, ids=question.ids, images=images)
        inputs = inputs.to("cpu", dtype=self.engine.model.dtype)  # the engine moves what it computes with
        settings, generations = question.settings, []
        try:
            for i, sink in enumerate(sinks):
                if i > 0 and question.settings.seed is not None:  # else all answers would be the same
                    settings = replace(settings, seed=(question.settings.seed + i) % 2**63)
                generations.append(Generation(self.engine, inputs, settings, sink, goes_on=question.goes_on))
        except MemoryBudgetError as error:
            raise APIError(str(error), question.field, "context_length_exceeded") from error
        except StructureError as error:
            raise APIError(str(error), "response_format", "invalid_schema") from error
        return generations


@dataclass
class Question:
    """A prompt and how it is to be answered.

    Attributes:
        prompt, ids: the text, and its tokens.
        urls: where its pictures are, in order.
        settings: how answers are generated.
        field: the one of the request that has the prompt.
        count: how many answers there are to be.
        goes_on: whether the answers continue a text in the prompt, so that white space at their beginning is kept.
    """

    prompt: str
    ids: list[int]
    urls: Sequence[str]
    settings: GenerationSettings
    field: str
    count: int = 1
    goes_on: bool = False

"""The model that a server has, and what a request needs of it: a place, its prompt, its pictures, a generation."""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
from PIL import Image

from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.generation import Generation, MemoryBudgetError, PromptTooLongError
from deepseek_vl.engine.limits import RequestLimits
from deepseek_vl.engine.settings import GenerationSettings, as_stop_words
from deepseek_vl.imaging.open import ImageLoadError, ImageTooLargeError, data_url_bytes
from deepseek_vl.imaging.worker import PictureClient, PictureDecoder
from deepseek_vl.models import VLChatProcessor
from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.api.fetch import ImageFetcher
from deepseek_vl.serve.api.metrics import Metrics
from deepseek_vl.serve.api.protocol import ChatCompletionRequest, ImagePart, SystemMessage
from deepseek_vl.utils.conversation import Rendered


@dataclass
class Service:
    """A model's engine and how it is served.

    Attributes:
        name: what clients call the model.
        engine, processor: the model's.
        settings: how answers are generated where a request does not say.
        key: the bearer token that clients must have; None for no such need.
        names: that the server answers to, see `names_of`; None for all.
        limits, fetcher: see there.
        places_taken: by requests, of those that `place` gives.
        preparing: as many turns as requests may be prepared and have not begun, in the order of their coming.
        bodies_bytes: of requests that are being read.
        seconds_in_place: how long the latest requests had theirs, on average.
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
    places_taken: int = 0
    bodies_bytes: int = 0
    seconds_in_place: float = 0.0

    def __post_init__(self) -> None:
        self._is_closing = False
        self.preparing = asyncio.Semaphore(self.limits.prepared)
        self.decoder = PictureDecoder(self.limits.pictures, self.limits.decoders)
        self._decoding = anyio.CapacityLimiter(self.limits.decoders)  # so that those who wait take no thread

    def cancel(self) -> None:
        """End every answer, and begin none any more."""
        self._is_closing = True
        self.engine.cancel()

    def check_open(self) -> None:
        """
        Raises:
            APIError: if the server is shutting down.
        """
        if self._is_closing:
            raise APIError("The server is shutting down.", status=503)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place in the batch or in the queue for it.

        Raises:
            APIError: if there is none. Its `Retry-After` is the time until one is free, if it goes on as it went.
        """
        if self.places_taken >= self.engine.limits.max_rows + self.limits.waiting:
            raise APIError(
                "Too many requests are waiting; try again.",
                status=429,
                headers={"Retry-After": str(max(1, math.ceil(self.seconds_in_place / self.places_taken)))},
            )
        self.places_taken += 1
        begun = time.monotonic()
        try:
            yield
        finally:
            self.places_taken -= 1
            seconds = time.monotonic() - begun
            self.seconds_in_place += (seconds - self.seconds_in_place) * (0.1 if self.seconds_in_place else 1)

    async def images_of(self, request: ChatCompletionRequest) -> list[Image.Image]:
        """A request's pictures, decoded.

        Raises:
            APIError: for too many, or one that cannot be fetched or read.
        """
        urls = [
            part.image_url.url
            for message in request.messages
            for part in message.content
            if isinstance(part, ImagePart)
        ]
        if len(urls) > self.limits.images:
            raise APIError(f"The request has {len(urls)} images; at most {self.limits.images} are taken.", "messages")
        client = self.decoder.client()
        try:
            return [await self._image(client, number, url) for number, url in enumerate(urls, 1)]
        finally:
            client.leave()  # a picture that is being decoded for who has gone is given up

    async def _image(self, client: PictureClient, number: int, url: str) -> Image.Image:
        fetched = None if url[:5].lower() == "data:" else await self.fetcher.fetch(url)

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
            raise APIError(message, "messages", "invalid_image") from error
        except ImageLoadError as error:
            kinds = ", ".join(limits.formats)
            message = (
                f"Image {number} cannot be read within {limits.seconds:g} seconds: it must be a whole {kinds} picture, "
                "here as a base64 data URL."
            )
            raise APIError(message, "messages", "invalid_image") from error

    def prompt_of(self, request: ChatCompletionRequest) -> tuple[Rendered, list[int]]:
        """A request's prompt and its ids; what clients wrote stays text.

        Raises:
            APIError: for messages that are no conversation, or too long.
        """
        prompt = self.processor.render(_messages(request), untrusted=True)
        ids, _ = self.processor.encode(prompt)
        try:
            self.engine.check_prompt(self.processor.count_tokens(prompt, ids))  # before any picture is decoded
        except PromptTooLongError as error:
            message = f"The prompt has {error.tokens} tokens; it and the answer share {error.positions} positions."
            raise APIError(message, "messages", "context_length_exceeded") from error
        return prompt, ids

    def generation(
        self,
        request: ChatCompletionRequest,
        prompt: Rendered,
        ids: list[int],
        images: Sequence[Image.Image],
        sink: Callable[[Any], None],
    ) -> Generation:
        """What a request asks of the engine."""
        inputs = self.processor(prompt=prompt, ids=ids, images=images)
        inputs = inputs.to("cpu", dtype=self.engine.model.dtype)  # the engine moves what it computes with
        stop_words = as_stop_words(self.processor.new_chat_template().stop_str)
        try:
            return Generation(self.engine, inputs, request.settings(self.settings, stop_words), sink)
        except MemoryBudgetError as error:
            raise APIError(str(error), "messages", "context_length_exceeded") from error


def _messages(request: ChatCompletionRequest) -> list[dict[str, Any]]:
    """A request's messages as `render` takes them, with several of one role in a row as one, and the answer to come.

    Raises:
        APIError: if they are no conversation.
    """
    messages: list[dict[str, Any]] = []
    for i, message in enumerate(request.messages):
        role = "system" if isinstance(message, SystemMessage) else message.role
        if role == "system" and i > 0:
            raise APIError("Only the first message may be a system message.", f"messages.{i}.role")
        parts = [
            {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
            for part in message.content
        ]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += [{"type": "text", "text": "\n"}, *parts]
        else:
            messages.append({"role": role, "content": parts})
    turns = [message for message in messages if message["role"] != "system"]
    if not turns or turns[0]["role"] != "user" or turns[-1]["role"] != "user":
        raise APIError("The conversation must begin and end with a user message.", "messages")
    for turn in turns:
        if not any(part["type"] == "image" or part["text"].strip() for part in turn["content"]):
            raise APIError(f"A {turn['role']} message is empty.", "messages")
    return [*messages, {"role": "assistant", "content": ""}]

"""Answering one request: its prompts are given to the engine, and the answers are read piece by piece."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel

from deepseek_vl.engine.generation import END, Generation
from deepseek_vl.engine.structured import StructureError
from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.api.logprobs import ShownTokens, Token
from deepseek_vl.serve.api.service import Question, Service

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


async def run_to_its_end(
    function: Callable[..., Result], *arguments: Any, stop: Callable[[], None] = lambda: None
) -> Result:
    """Run a function in a thread. A caller that is cancelled waits for its end too, and keeps what limits such work.

    Args:
        stop: asks the function to end early; called when the caller is cancelled.
    """
    running = asyncio.ensure_future(run_in_threadpool(function, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop()
        await asyncio.gather(running, return_exceptions=True)
        raise


class CachedTokens(BaseModel):
    """How many tokens of a prompt were kept from earlier requests, and did not run again."""

    cached_tokens: int


class Usage(BaseModel):
    """How many tokens a request took; a prompt counts once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Piece(NamedTuple):
    """A piece of an answer.

    Attributes:
        index: which answer's.
        text: may be empty.
        logprobs: of the tokens that begin in the text; None where they are not asked for.
        finish_reason: `stop` or `length` with the last piece of an answer.
    """

    index: int
    text: str
    logprobs: list[Token] | None
    finish_reason: str | None


@dataclass
class WholeAnswer:
    """A whole answer; the attributes are those of `Piece`."""

    text: str = ""
    logprobs: list[Token] | None = None
    finish_reason: str = ""


class Request(Protocol):
    """A request for answers, of any API."""

    def questions(self, service: Service) -> list[Question]:
        """The questions that the request asks."""


class _Reader:
    """Makes pieces of one answer from the text that its generation gives."""

    def __init__(self, index: int, generation: Generation, question: Question, service: Service):
        self._index = index
        self._generation = generation
        # White space before the first word belongs to the prompt's format.
        self._strips = not question.goes_on and question.settings.structured is None
        asked = question.settings.logprobs is not None
        self._tokens = ShownTokens(generation, service.token_bytes) if asked else None
        self._is_first = True

    def read(self, text: str, finish_reason: str | None = None) -> Piece:
        dropped = 0
        if text and self._is_first:
            self._is_first, whole = False, text
            text = text.lstrip() if self._strips else text
            dropped = self._generation.dropped + len(whole.encode("utf-8")) - len(text.encode("utf-8"))
        tokens = None if self._tokens is None else self._tokens.take(text, dropped)
        return Piece(self._index, text, tokens, finish_reason)


class Answer:
    """The answers to one request, passed from the engine's thread to this one's event loop.

    A context manager, which cancels the generations at its end.

    Attributes:
        generations: one for each answer to each question, in order.
    """

    def __init__(self, service: Service):
        self.service = service
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._begun = 0.0
        self._is_preparing = False
        self._readers: list[_Reader] = []
        self._of_prompts: list[int] = []
        self.generations: list[Generation] = []

    async def begin(self, request: Request) -> None:
        """Prepare a request's prompts and, when it is its turn, their pictures, and give them to the engine.

        Raises:
            APIError: for a request that is wrong or too long, for pictures that cannot be read, or at a shutdown.
        """
        service, self._begun = self.service, time.monotonic()
        questions = await run_to_its_end(request.questions, service)
        if any(question.urls for question in questions):  # texts alone take no memory to speak of
            await service.preparing.acquire()
            self._is_preparing = True
        service.check_open()
        for question in questions:
            images = await service.images_of(question.urls, question.field)
            self._of_prompts.append(len(self.generations))
            sinks = [partial(self._sink, len(self.generations) + i) for i in range(question.count)]
            generations = await run_to_its_end(service.generations, question, images, sinks)
            self._readers += [
                _Reader(len(self.generations) + i, generation, question, service)
                for i, generation in enumerate(generations)
            ]
            self.generations += generations
        for generation in self.generations:
            service.engine.submit(generation)

    def _sink(self, index: int, item: Any) -> None:
        """Pass an item of a generation to the event loop; the engine's thread calls it."""
        if item is END:
            self.service.metrics.count_tokens(self.generations[index])
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._take, index, item)

    def _take(self, index: int, item: Any) -> None:
        self._let_others_prepare()  # the prompt has run
        self._queue.put_nowait((index, item))

    def _let_others_prepare(self) -> None:
        if self._is_preparing:
            self._is_preparing = False
            self.service.preparing.release()

    def __enter__(self) -> "Answer":
        return self

    def __exit__(self, *error: object) -> None:
        self._let_others_prepare()
        for generation in self.generations:
            generation.cancelled.set()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answers, piece by piece, as they come.

        Raises:
            APIError: if the model fails, or the server shuts down.
        """
        first, left = True, len(self.generations)
        while left:
            index, item = await self._queue.get()
            generation, reader = self.generations[index], self._readers[index]
            if isinstance(item, str):
                if first:
                    self.service.metrics.first_piece.observe(time.monotonic() - self._begun)
                    first = False
                piece = reader.read(item)
                if piece.text or piece.logprobs:
                    yield piece
            elif item is not END:
                if isinstance(item, StructureError):
                    raise APIError(str(item), "response_format") from item
                logger.error("A generation failed.", exc_info=item)
                raise APIError("The model failed on this request.", status=500)
            elif generation.finish_reason == "cancelled":
                raise APIError("The server is shutting down.", status=503)
            else:
                left -= 1
                yield reader.read("", generation.finish_reason)

    async def whole(self) -> list[WholeAnswer]:
        """Wait for all answers, and return them whole."""
        answers = [WholeAnswer() for _ in self.generations]
        async for piece in self.pieces():
            answer = answers[piece.index]
            answer.text += piece.text
            answer.finish_reason = piece.finish_reason or ""
            if piece.logprobs is not None:
                answer.logprobs = (answer.logprobs or []) + piece.logprobs
        return answers

    def usage(self) -> Usage:
        """How many tokens the prompts and the answers took."""
        prompts = [self.generations[i] for i in self._of_prompts]
        prompt = sum(generation.prompt_tokens for generation in prompts)
        completion = sum(len(generation.token_ids) for generation in self.generations)
        cached = sum(generation.cached_tokens for generation in prompts)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=CachedTokens(cached_tokens=cached),
        )

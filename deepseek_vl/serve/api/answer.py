"""One answer, on its way from a request to the engine and back."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi.concurrency import run_in_threadpool

from deepseek_vl.engine.generation import END, Generation
from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.api.protocol import CachedTokens, ChatCompletionRequest, Usage
from deepseek_vl.serve.api.service import Service

logger = logging.getLogger(__name__)


class Answer:
    """An answer on its way from the engine's thread to this one's event loop.

    Whoever leaves the context ends the generation.
    """

    def __init__(self, service: Service):
        self.service = service
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._begun = 0.0
        self._is_preparing = False
        self.generation: Generation | None = None

    async def begin(self, request: ChatCompletionRequest) -> None:
        """Prepare a request's prompt and, when it is its turn, its pictures, and give them to the engine.

        Raises:
            APIError: for messages that are no conversation or too long, pictures that cannot be had, or if the server
                shuts down.
        """
        service, self._begun = self.service, time.monotonic()
        prompt, ids = await run_in_threadpool(service.prompt_of, request)
        await service.preparing.acquire()
        self._is_preparing = True
        service.check_open()
        images = await service.images_of(request)
        self.generation = await run_in_threadpool(service.generation, request, prompt, ids, images, self._sink)
        service.engine.submit(self.generation)

    def _sink(self, item: Any) -> None:
        """Called in the engine's thread."""
        if item is END:
            self.service.metrics.count_tokens(self.generation)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._take, item)

    def _take(self, item: Any) -> None:
        self._let_others_prepare()  # the prompt has run
        self._queue.put_nowait(item)

    def _let_others_prepare(self) -> None:
        if self._is_preparing:
            self._is_preparing = False
            self.service.preparing.release()

    def __enter__(self) -> "Answer":
        return self

    def __exit__(self, *error: object) -> None:
        self._let_others_prepare()
        if self.generation is not None:
            self.generation.cancelled.set()

    async def pieces(self) -> AsyncIterator[str]:
        """Its text, piece by piece.

        Raises:
            APIError: if the model fails, or the server shuts down.
        """
        first = True
        while isinstance(item := await self._queue.get(), str):
            if first:
                self.service.metrics.first_piece.observe(time.monotonic() - self._begun)
                # What the first token's text begins with is the format's own space.
                item, first = item.lstrip(), False
            if item:
                yield item
        if item is not END:
            logger.error("A generation failed.", exc_info=item)
            raise APIError("The model failed on this request.", status=500)
        if self.generation.finish_reason == "cancelled":
            raise APIError("The server is shutting down.", status=503)

    async def whole(self) -> str:
        """All of the answer."""
        return "".join([piece async for piece in self.pieces()])

    def usage(self) -> Usage:
        """How many tokens it took."""
        prompt, completion = self.generation.prompt_tokens, len(self.generation.token_ids)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=CachedTokens(cached_tokens=self.generation.cached_tokens),
        )

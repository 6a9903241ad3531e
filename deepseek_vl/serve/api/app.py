"""The routes, and a request's way through the server: key, size, JSON, a place, pictures, engine, answer."""

import asyncio
import contextlib
import hmac
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from deepseek_vl import __version__
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.generation import END, Generation, MemoryBudgetError, PromptTooLongError
from deepseek_vl.engine.limits import RequestLimits
from deepseek_vl.engine.settings import GenerationSettings, as_stop_words
from deepseek_vl.imaging.open import ImageLoadError, ImageTooLargeError, data_url_bytes
from deepseek_vl.imaging.worker import PictureClient, PictureDecoder
from deepseek_vl.models import VLChatProcessor
from deepseek_vl.serve.api.errors import APIError, ErrorBody
from deepseek_vl.serve.api.fetch import ImageFetcher
from deepseek_vl.serve.api.metrics import Metrics
from deepseek_vl.serve.api.protocol import (
    AnswerMessage,
    CachedTokens,
    ChatCompletion,
    ChatCompletionRequest,
    Choice,
    Health,
    ImagePart,
    Model,
    ModelList,
    SystemMessage,
    Usage,
    parse,
    request_schema,
)
from deepseek_vl.serve.listening import OwnNames, Patience
from deepseek_vl.utils.conversation import Rendered

logger = logging.getLogger(__name__)

REQUEST = "ChatCompletionRequest"
REF = "#/components/schemas/{model}"
EVENT = {
    "type": "object",
    "description": "Each event's data: a chat.completion.chunk or an error as JSON, and [DONE] as the last.",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}

Result = TypeVar("Result")


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
        self.decoder = PictureDecoder(self.limits.pictures, self.limits.decoders)
        self._decoding = anyio.CapacityLimiter(self.limits.decoders)  # so that those who wait take no thread

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
        sink: Any,
    ) -> Generation:
        """What a request asks of the engine."""
        inputs = self.processor(prompt=prompt, ids=ids, images=images)
        inputs = inputs.to(self.engine.model.device, dtype=self.engine.model.dtype)
        stop_words = as_stop_words(self.processor.new_chat_template().stop_str)
        try:
            return Generation(self.engine, inputs, request.settings(self.settings, stop_words), sink)
        except MemoryBudgetError as error:
            raise APIError(str(error), "messages", "context_length_exceeded") from error

    async def begin(self, request: ChatCompletionRequest, answer: "_Answer") -> None:
        """Prepare a request's prompt and pictures, and give them to the engine.

        Raises:
            APIError: for messages that are no conversation or too long, or pictures that cannot be had.
        """
        prompt, ids = await run_in_threadpool(self.prompt_of, request)
        images = await self.images_of(request)
        answer.begin(await run_in_threadpool(self.generation, request, prompt, ids, images, answer.sink))


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


class _Answer:
    """An answer on its way from the engine's thread to this one's event loop.

    Iterating gives pieces of text. Whoever leaves the context ends the generation.
    """

    def __init__(self, service: Service):
        self.service = service
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self.generation: Generation | None = None

    def sink(self, item: Any) -> None:
        """Called in the engine's thread."""
        if item is END:
            self.service.metrics.count_tokens(self.generation)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def __enter__(self) -> "_Answer":
        return self

    def __exit__(self, *error: object) -> None:
        if self.generation is not None:
            self.generation.cancelled.set()

    def begin(self, generation: Generation) -> None:
        self.generation = generation
        self.service.engine.submit(generation)

    async def pieces(self) -> AsyncIterator[str]:
        metrics, begun = self.service.metrics, time.monotonic()
        first = True
        while isinstance(item := await self._queue.get(), str):
            if first:
                metrics.first_piece.observe(time.monotonic() - begun)
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
        prompt, completion = self.generation.prompt_tokens, len(self.generation.token_ids)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=CachedTokens(cached_tokens=self.generation.cached_tokens),
        )


def create_app(service: Service) -> FastAPI:
    """The server for one model."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.engine.close)
        await run_in_threadpool(service.decoder.close)

    app = FastAPI(
        title="DeepSeek-VL",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses=_errors(405, 500, *([] if service.names is None else [421])),
    )
    keyed = {} if service.key is None else _errors(401, 429)

    @app.exception_handler(APIError)
    async def on_error(request: Request, error: APIError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:  # Starlette's own `Allow` is of one route, and a path may have several
            fitting = (route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE)
            allowed = sorted({method for route in fitting for method in route.methods})
            error = APIError("This route does not take that method.", status=405, headers={"Allow": ", ".join(allowed)})
            return error.response()
        return APIError("There is no such route.", status=404).response()

    @app.exception_handler(Exception)
    async def on_failure(request: Request, error: Exception) -> Response:
        return APIError("The server failed on this request.", status=500).response()

    @app.get("/health")
    @app.head("/health")
    async def health() -> Health:
        """Whether the server answers."""
        return Health()

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **keyed},
    )
    async def metrics() -> Response:
        """The server's numbers, for Prometheus."""
        return service.metrics.response(service.engine)

    @app.get("/v1/models", responses=keyed)
    async def models() -> ModelList:
        """The one model."""
        return ModelList(data=[_model(service)])

    @app.get("/v1/models/{name:path}", responses={**keyed, **_errors(404)})
    async def model(name: str) -> Model:
        """The model of that name."""
        _check_model(service, name)
        return _model(service)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={
            200: {"content": {_EventStream.media_type: {"schema": EVENT}}},
            **keyed,
            **_errors(400, 404, 413, 415, 429, 503),
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": REF.format(model=REQUEST)}}},
            }
        },
    )
    async def chat_completions(request: Request) -> Response:
        """The model's answer to a conversation, whole or as server-sent events."""
        return await _chat_completions(service, request)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            request = request_schema(service.name, REF)
            schema["components"]["schemas"] |= {**request.pop("$defs"), REQUEST: request}
            if service.key is not None:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                for path, operations in schema["paths"].items():
                    for operation in operations.values() if path != "/health" else ():
                        operation["security"] = [{"key": []}]
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)  # FastAPI's own, for parameters that may be wrong
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi
    app.add_middleware(_Guard, service=service)
    if service.names is not None:
        refusal = APIError("This server does not go by the name in the Host header; see --allowed_host.", status=421)
        app.add_middleware(OwnNames, names=service.names, refusal=refusal.response())
    return app


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the routes' description says of some error statuses."""
    about = {
        400: "The request is wrong",
        401: "The API key is missing or wrong",
        404: "There is no such model",
        405: "The route does not take that method",
        413: "The body is too large",
        415: "The body is no JSON",
        421: "The server does not go by that name",
        429: "Too many requests are waiting; see Retry-After",
        500: "The server failed",
        503: "The server is busy, see Retry-After, or shutting down",
    }
    return {status: {"model": ErrorBody, "description": about[status]} for status in statuses}


def _model(service: Service) -> Model:
    return Model(id=service.name, created=service.created)


def _check_model(service: Service, name: str) -> None:
    if name != service.name:
        raise APIError(
            f"There is no such model here; this server has {service.name!r}.", "model", "model_not_found", status=404
        )


async def _chat_completions(service: Service, http_request: Request) -> Response:
    with contextlib.ExitStack() as stack:
        answer = stack.enter_context(_Answer(service))
        stream, include_usage = await _begin(service, http_request, answer, stack)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
        if stream:
            return _EventStream(_events(answer, head, include_usage), stack.pop_all())
        message = AnswerMessage(content=await _unless_gone(http_request, answer.whole()))
        choice = Choice(message=message, finish_reason=answer.generation.finish_reason)
        return JSONResponse(ChatCompletion(**head, choices=[choice], usage=answer.usage()).model_dump())


async def _begin(
    service: Service, http_request: Request, answer: _Answer, stack: contextlib.ExitStack
) -> tuple[bool, bool]:
    """Read a request, take its place into `stack` and give it to the engine; it is not kept behind that.

    Returns:
        whether it asks for a stream, and with the usage.

    Raises:
        APIError: if it cannot be done.
    """
    with _Body(service) as body:
        request = await run_in_threadpool(parse, await body.read(http_request), service.limits)
        _check_model(service, request.model)
        stack.enter_context(service.place())
        await _unless_gone(http_request, service.begin(request, answer))
        options = request.stream_options
        return bool(request.stream), options is not None and options.include_usage


class _Body:
    """A request's body. Whoever leaves the context is done with it, and gives its bytes back to the server's budget."""

    def __init__(self, service: Service):
        self._service = service
        self._size = 0

    def __enter__(self) -> "_Body":
        return self

    def __exit__(self, *error: object) -> None:
        self._service.bodies_bytes -= self._size

    async def read(self, request: Request) -> bytearray:
        """The bytes.

        Raises:
            APIError: if they are not declared as JSON, are too many, alone or with others', or come too slowly.
        """
        limits = self._service.limits
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise APIError("The body must be JSON, and the Content-Type application/json.", status=415)
        too_large = APIError(f"The body is larger than {limits.body_bytes} bytes.", status=413)
        if int(request.headers.get("content-length", "0")) > limits.body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for chunk in request.stream():
                    body += chunk
                    self._size += len(chunk)
                    self._service.bodies_bytes += len(chunk)
                    if self._size > limits.body_bytes:
                        raise too_large
                    if self._service.bodies_bytes > limits.bodies_bytes:
                        raise APIError(
                            "The server is reading too much at the moment; try again.",
                            status=503,
                            headers={"Retry-After": "1"},
                        )
        except TimeoutError as error:
            raise APIError("The body did not arrive in time.") from error
        except ClientDisconnect as error:
            raise APIError("The client has closed the connection.") from error
        return body


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of some work, which is given up if the client goes away before.

    Raises:
        APIError: if it does.
    """

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(until_gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise APIError("The client has closed the connection.")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _EventStream(StreamingResponse):
    """Server-sent events; `stack` is left behind the last, or when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], stack: contextlib.ExitStack):
        super().__init__(events, headers={"Cache-Control": "no-store"})
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stack:
            await super().__call__(scope, receive, send)


async def _events(answer: _Answer, head: dict[str, Any], include_usage: bool) -> AsyncIterator[bytes]:
    """An answer as server-sent events."""

    def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        usage = {"usage": None} if include_usage else {}
        return _event({**head, "object": "chat.completion.chunk", "choices": [choice], **usage})

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for piece in answer.pieces():
            yield chunk({"content": piece})
    except APIError as error:  # the status has been sent
        yield _event(error.body())
        return
    yield chunk({}, answer.generation.finish_reason)
    if include_usage:
        yield _event({**head, "object": "chat.completion.chunk", "choices": [], "usage": answer.usage().model_dump()})
    yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode("utf-8") + b"\n\n"


class _Guard:
    """Asks for the key before anything else, and counts the answers."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app = app
        self.service = service
        self._patience = Patience(service.limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the server's start and end
            await self.app(scope, receive, send)
            return

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                self.service.metrics.requests.labels(status=message["status"], route=route).inc()
            await send(message)

        app: Any = self.app
        # The path as it was asked for: what is made of it and the Host header, as `Request.url` is, a client can bend.
        if scope["path"] != "/health" and not self._has_key(scope):
            app = (await self._refusal()).response()
        await app(scope, receive, counted)

    async def _refusal(self) -> APIError:
        if not await self._patience.wait():
            return APIError("Too many wrong API keys are tried; try again.", status=429, headers={"Retry-After": "1"})
        return APIError(
            "The API key is missing or wrong.",
            code="invalid_api_key",
            status=401,
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _has_key(self, scope: Scope) -> bool:
        if self.service.key is None:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.service.key.encode("utf-8"))

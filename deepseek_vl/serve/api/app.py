"""The routes, and a request's way through the server: key, size, JSON, a place, pictures, engine, answer."""

import asyncio
import contextlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from deepseek_vl.engine.engine import engine_of
from deepseek_vl.engine.generation import END, Generation, PromptTooLongError
from deepseek_vl.engine.limits import SAFE_FORMATS, SAFE_IMAGES, SAFE_PIXELS
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.engine.stream import as_stop_words
from deepseek_vl.imaging.open import ImageLoadError, ImageTooLargeError, load_image
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.serve.api import errors
from deepseek_vl.serve.api.fetch import ImageFetcher
from deepseek_vl.serve.api.metrics import Metrics
from deepseek_vl.serve.api.protocol import AssistantMessage, ChatCompletionRequest, ImagePart, SystemMessage, parse

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a client may ask of the server.

    Attributes:
        body_bytes: of a request.
        body_seconds: until a request's body has arrived.
        images: in one request.
        pixels: of one image.
        waiting: requests that wait for a place in the batch; more are turned away.
    """

    body_bytes: int = 32 * 2**20
    body_seconds: float = 60.0
    images: int = SAFE_IMAGES
    pixels: int = SAFE_PIXELS
    waiting: int = 64


@dataclass
class Service:
    """A model and how it is served.

    Attributes:
        name: what clients call the model.
        settings: how answers are generated where a request does not say.
        key: the bearer token that clients must have; None for no such need.
        limits, fetcher: see there.
    """

    name: str
    model: MultiModalityCausalLM
    processor: VLChatProcessor
    settings: GenerationSettings
    key: str | None = None
    limits: Limits = Limits()
    fetcher: ImageFetcher = field(default_factory=ImageFetcher)
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    places_taken: int = 0

    @contextlib.contextmanager
    def place(self) -> Any:
        """A place in the batch or in the queue for it.

        Raises:
            Overloaded: if there is none.
        """
        if self.places_taken >= engine_of(self.model).max_rows + self.limits.waiting:
            raise errors.Overloaded("Too many requests are waiting; try again.", headers={"Retry-After": "1"})
        self.places_taken += 1
        try:
            yield
        finally:
            self.places_taken -= 1

    async def images_of(self, request: ChatCompletionRequest) -> list[Image.Image]:
        """A request's pictures, decoded.

        Raises:
            BadRequest: for too many, or one that cannot be fetched or read.
        """
        urls = [
            part.image_url.url
            for message in request.messages
            for part in message.content
            if isinstance(part, ImagePart)
        ]
        if len(urls) > self.limits.images:
            raise errors.BadRequest(
                f"The request has {len(urls)} images; at most {self.limits.images} are taken.", "messages"
            )
        return [await self._image(number, url) for number, url in enumerate(urls, 1)]

    async def _image(self, number: int, url: str) -> Image.Image:
        source = url if url[:5].lower() == "data:" else await self.fetcher.fetch(url)
        try:
            return await run_in_threadpool(load_image, source, SAFE_FORMATS, self.limits.pixels)
        except ImageTooLargeError as error:
            message = f"Image {number} has more than {self.limits.pixels} pixels."
            raise errors.BadRequest(message, "messages", "invalid_image") from error
        except ImageLoadError as error:
            kinds = ", ".join(SAFE_FORMATS)
            message = f"Image {number} cannot be read: it must be a whole {kinds} picture, here as a base64 data URL."
            raise errors.BadRequest(message, "messages", "invalid_image") from error

    def generation(self, request: ChatCompletionRequest, images: Sequence[Image.Image], sink: Any) -> Generation:
        """What a request asks of the engine.

        Raises:
            BadRequest: for messages that are no conversation, or too long.
        """
        system, messages = self._messages(request)
        processor = self.processor
        prompt = processor.apply_sft_template_for_multi_turn_prompts(messages, processor.sft_format, system)
        inputs = processor(prompt=prompt, images=images).to(self.model.device, dtype=self.model.dtype)
        stop_words = as_stop_words(processor.new_chat_template().stop_str)
        settings = request.settings(self.settings, stop_words)
        try:
            return Generation(self.model, processor.tokenizer, inputs, settings, sink)
        except PromptTooLongError as error:
            message = f"The prompt has {error.tokens} tokens; it and the answer share {error.positions} positions."
            raise errors.BadRequest(message, "messages", "context_length_exceeded") from error

    def _messages(self, request: ChatCompletionRequest) -> tuple[str, list[dict[str, str]]]:
        """The system prompt, and the messages as the processor renders them; what clients wrote stays text."""
        system = self.processor.system_prompt
        user, assistant = self.processor.new_chat_template().roles
        messages: list[dict[str, str]] = []
        for i, message in enumerate(request.messages):
            content = ""
            for part in message.content:
                is_image = isinstance(part, ImagePart)
                content += self.processor.image_tag if is_image else self.processor.literal(part.text)
            if isinstance(message, SystemMessage):
                if i > 0:
                    raise errors.BadRequest("Only the first message may be a system message.", f"messages.{i}.role")
                system = content
                continue
            role = assistant if isinstance(message, AssistantMessage) else user
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"] += f"\n{content}"
            else:
                messages.append({"role": role, "content": content})
        if not messages or messages[0]["role"] != user or messages[-1]["role"] != user:
            raise errors.BadRequest("The conversation must begin and end with a user message.", "messages")
        for message in messages:
            if not message["content"].strip():
                raise errors.BadRequest(f"A {message['role'].lower()} message is empty.", "messages")
        return system, [*messages, {"role": assistant, "content": ""}]


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
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def __enter__(self) -> "_Answer":
        return self

    def __exit__(self, *error: object) -> None:
        if self.generation is not None:
            self.generation.cancelled.set()

    def begin(self, generation: Generation) -> None:
        self.generation = generation
        engine_of(self.service.model).submit(generation)

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
        usage = self.usage()
        metrics.prompt_tokens.inc(usage["prompt_tokens"])
        metrics.cached_tokens.inc(self.generation.cached_tokens)
        metrics.completion_tokens.inc(usage["completion_tokens"])
        if item is not END:
            logger.error("A generation failed.", exc_info=item)
            raise errors.APIError("The model failed on this request.")
        if self.generation.finish_reason == "cancelled":
            raise errors.Unavailable("The server is shutting down.")

    def usage(self) -> dict[str, Any]:
        prompt, completion = self.generation.prompt_tokens, len(self.generation.text.token_ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.generation.cached_tokens},
        }


def create_app(service: Service) -> FastAPI:
    """The server for one model."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine_of(service.model).close)

    app = FastAPI(title="DeepSeek-VL", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.exception_handler(errors.APIError)
    async def on_error(request: Request, error: errors.APIError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            return errors.MethodNotAllowed("This route does not take that method.").response()
        return errors.NotFound("There is no such route.").response()

    @app.exception_handler(Exception)
    async def on_failure(request: Request, error: Exception) -> Response:
        return errors.APIError("The server failed on this request.").response()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return service.metrics.response(engine_of(service.model))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(service, name)
        return _model(service)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _chat_completions(service, request)

    app.add_middleware(_Guard, service=service)
    return app


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "deepseek_vl"}


def _check_model(service: Service, name: str) -> None:
    if name != service.name:
        raise errors.NotFound(
            f"There is no such model here; this server has {service.name!r}.", "model", "model_not_found"
        )


async def _chat_completions(service: Service, http_request: Request) -> Response:
    request = parse(await _json(http_request, service.limits))
    _check_model(service, request.model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(service.place())
        answer = stack.enter_context(_Answer(service))
        images = await service.images_of(request)
        answer.begin(await run_in_threadpool(service.generation, request, images, answer.sink))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}
        if request.stream:
            include_usage = request.stream_options is not None and request.stream_options.include_usage
            return _EventStream(_events(answer, head, include_usage), stack.pop_all())
        text = await _whole(answer, http_request)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": answer.generation.finish_reason,
            "logprobs": None,
        }
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": answer.usage()})


async def _json(request: Request, limits: Limits) -> Any:
    """The body, as far as it is small enough, in time and JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise errors.BadRequest("The body must be JSON, and the Content-Type application/json.")
    too_large = errors.TooLarge(f"The body is larger than {limits.body_bytes} bytes.")
    if int(request.headers.get("content-length", "0")) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError as error:
        raise errors.BadRequest("The body did not arrive in time.") from error
    except ClientDisconnect as error:
        raise errors.BadRequest("The client has closed the connection.") from error
    try:
        return await run_in_threadpool(_decode, bytes(body))
    except (ValueError, RecursionError) as error:
        raise errors.BadRequest("The body is not JSON in UTF-8.") from error


def _decode(body: bytes) -> Any:
    value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails for lone surrogates, which are no text
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


async def _whole(answer: _Answer, request: Request) -> str:
    """All of an answer, unless the client goes away before."""

    async def collect() -> str:
        return "".join([piece async for piece in answer.pieces()])

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(collect()), asyncio.create_task(until_gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise errors.BadRequest("The client has closed the connection.")
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
    except errors.APIError as error:  # the status has been sent
        yield _event(error.body())
        return
    yield chunk({}, answer.generation.finish_reason)
    if include_usage:
        yield _event({**head, "object": "chat.completion.chunk", "choices": [], "usage": answer.usage()})
    yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode("utf-8") + b"\n\n"


class _Guard:
    """Asks for the key before anything else, and counts the answers."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.service.metrics.requests.labels(status=message["status"]).inc()
            await send(message)

        app: Any = self.app
        if scope["path"] != "/health" and not self._has_key(scope):
            error = errors.Unauthorized(
                "The API key is missing or wrong.", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )
            app = error.response()
        await app(scope, receive, counted)

    def _has_key(self, scope: Scope) -> bool:
        if self.service.key is None:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.service.key.encode("utf-8"))

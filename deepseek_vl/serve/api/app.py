"""The routes, and a request's way through the server: key, body, a place, prompt, pictures, engine, answer."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from deepseek_vl import __version__
from deepseek_vl.serve.api.answer import Answer
from deepseek_vl.serve.api.body import Body
from deepseek_vl.serve.api.errors import APIError, ErrorBody
from deepseek_vl.serve.api.guard import Guard
from deepseek_vl.serve.api.protocol import (
    AnswerMessage,
    ChatCompletion,
    Choice,
    Health,
    Model,
    ModelList,
    parse,
    request_schema,
)
from deepseek_vl.serve.api.service import Service
from deepseek_vl.serve.listening import OwnNames

REQUEST = "ChatCompletionRequest"
REF = "#/components/schemas/{model}"
EVENT = {
    "type": "object",
    "description": "Each event's data: a chat.completion.chunk or an error as JSON, and [DONE] as the last.",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}

Result = TypeVar("Result")


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
        return service.metrics.response(service.engine, service.places_taken)

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
    app.add_middleware(Guard, service=service)
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
        answer = stack.enter_context(Answer(service))
        stream, include_usage = await _begin(service, http_request, answer, stack)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
        if stream:
            return _EventStream(_events(answer, head, include_usage), stack.pop_all())
        message = AnswerMessage(content=await _unless_gone(http_request, answer.whole()))
        choice = Choice(message=message, finish_reason=answer.generation.finish_reason)
        return JSONResponse(ChatCompletion(**head, choices=[choice], usage=answer.usage()).model_dump())


async def _begin(
    service: Service, http_request: Request, answer: Answer, stack: contextlib.ExitStack
) -> tuple[bool, bool]:
    """Read a request, take its place into `stack` and give it to the engine; it is not kept behind that.

    Returns:
        whether it asks for a stream, and with the usage.

    Raises:
        APIError: if it cannot be done.
    """
    with Body(service) as body:
        request = await run_in_threadpool(parse, await body.read(http_request), service.limits)
        _check_model(service, request.model)
        stack.enter_context(service.place())
        await _unless_gone(http_request, answer.begin(request))
        options = request.stream_options
        return bool(request.stream), options is not None and options.include_usage


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


async def _events(answer: Answer, head: dict[str, Any], include_usage: bool) -> AsyncIterator[bytes]:
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

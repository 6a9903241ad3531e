"""The routes, and the steps of a request: key, body, a place in the queue, prompt, pictures, engine, answer."""

import asyncio
import contextlib
import inspect
import threading
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match

from deepseek_vl import __version__
from deepseek_vl.serve.api.answer import Answer, run_to_its_end
from deepseek_vl.serve.api.body import Body
from deepseek_vl.serve.api.chat import ChatCompletion, ChatCompletionRequest, ChatReply
from deepseek_vl.serve.api.completions import Completion, CompletionReply, CompletionRequest
from deepseek_vl.serve.api.embeddings import EmbeddingList, EmbeddingRequest, embed
from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.api.events import EventStream
from deepseek_vl.serve.api.fields import Strict, check_model
from deepseek_vl.serve.api.guard import Guard
from deepseek_vl.serve.api.models import Health, Model, ModelList, Version
from deepseek_vl.serve.api.openapi import describe, errors, takes
from deepseek_vl.serve.api.parse import parse
from deepseek_vl.serve.api.responses import Response as ModelResponse
from deepseek_vl.serve.api.responses import ResponseReply
from deepseek_vl.serve.api.responses_request import ResponseRequest
from deepseek_vl.serve.api.service import Service
from deepseek_vl.serve.api.tokenization import TokenizeRequest, Tokens, tokenize
from deepseek_vl.serve.listening import OwnNames

Result = TypeVar("Result")
Read = TypeVar("Read", bound=Strict)


def create_app(service: Service) -> FastAPI:
    """Create the server for one model."""

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
        responses=errors(405, 500, *([] if service.names is None else [421])),
    )
    _add_error_handlers(app)
    _add_descriptions(app, service)
    _add_answers(app, service)
    describe(
        app, service, (ChatCompletionRequest, CompletionRequest, ResponseRequest, EmbeddingRequest, TokenizeRequest)
    )
    app.add_middleware(Guard, service=service)
    if service.origins:  # before the key is checked: browsers' preflight requests have none
        # Browsers want a further permission for servers on this machine or network; old Starlettes cannot give it.
        known = "allow_private_network" in inspect.signature(CORSMiddleware).parameters
        options: dict[str, Any] = {"allow_private_network": True} if known else {}
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=("Retry-After",),
            **options,
        )
    if service.names is not None:
        refusal = APIError("This server does not go by the name in the Host header; see --allowed_host.", status=421)
        app.add_middleware(OwnNames, names=service.names, refusal=refusal.response())
    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(APIError)
    async def on_error(request: Request, error: APIError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:  # Starlette's own `Allow` covers one route; a path may have several
            fitting = (route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE)
            allowed = ", ".join(sorted({method for route in fitting for method in getattr(route, "methods", ())}))
            return APIError("This route does not take that method.", status=405, headers={"Allow": allowed}).response()
        return APIError("There is no such route.", status=404).response()

    @app.exception_handler(Exception)
    async def on_failure(request: Request, error: Exception) -> Response:
        return APIError("The server failed on this request.", status=500).response()


def _add_descriptions(app: FastAPI, service: Service) -> None:
    """Add the routes that describe the server and its model."""
    keyed = {} if service.key is None else errors(401, 429)
    this = Model(id=service.name, created=service.created, max_model_len=service.engine.positions)

    @app.get("/health")
    @app.head("/health")
    async def health() -> Health:
        """Whether the server answers."""
        return Health()

    @app.get("/version", responses=keyed)
    async def version() -> Version:
        """The package's version."""
        return Version(version=__version__)

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
        return ModelList(data=[this])

    @app.get("/v1/models/{name:path}", responses={**keyed, **errors(404)})
    async def model(name: str) -> Model:
        """The model of that name."""
        check_model(name, service.name)
        return this

    @app.post("/tokenize", response_model=Tokens, **takes(service, TokenizeRequest, waits=False))
    async def tokens(request: Request) -> Response:
        """The tokens of a text or a conversation."""
        with Body(service) as body:
            asked = await _read(service, request, body, TokenizeRequest)
            return await run_in_threadpool(tokenize, service, asked)


def _add_answers(app: FastAPI, service: Service) -> None:
    """Add the routes that run the model."""

    @app.post(
        "/v1/chat/completions", response_model=ChatCompletion, **takes(service, ChatCompletionRequest, streams=True)
    )
    async def chat_completions(request: Request) -> Response:
        """The model's answer to a conversation, whole or as server-sent events."""
        return await _answer(service, request, ChatCompletionRequest, ChatReply)

    @app.post("/v1/completions", response_model=Completion, **takes(service, CompletionRequest, streams=True))
    async def completions(request: Request) -> Response:
        """The model's continuation of a text, whole or as server-sent events."""
        return await _answer(service, request, CompletionRequest, CompletionReply)

    @app.post("/v1/responses", response_model=ModelResponse, **takes(service, ResponseRequest, streams=True))
    async def responses(request: Request) -> Response:
        """The model's response to a text or a conversation, whole or as server-sent events. Nothing is stored."""
        return await _answer(service, request, ResponseRequest, ResponseReply)

    @app.post("/v1/embeddings", response_model=EmbeddingList, **takes(service, EmbeddingRequest))
    async def embeddings(request: Request) -> Response:
        """Pictures as vectors."""
        with Body(service) as body, contextlib.ExitStack() as stack:
            asked = await _read(service, request, body, EmbeddingRequest)
            stack.enter_context(service.place())
            return JSONResponse(await _unless_gone(request, _embed(service, asked)))


async def _read(service: Service, request: Request, body: Body, model: type[Read]) -> Read:
    """Read and check a request's body.

    Raises:
        APIError: if it is too large, wrong, or for another model.
    """
    asked: Any = await run_in_threadpool(parse, await body.read(request), model, service.limits)
    if asked.model is not None:
        check_model(asked.model, service.name)
    return asked


async def _embed(service: Service, request: EmbeddingRequest) -> dict[str, Any]:
    async with service.preparing:  # as for answers: it limits how many pictures are decoded at a time
        service.check_open()
        images = await service.images_of([part.image_url.url for part in request.input], "input")
        has_left = threading.Event()
        return await run_to_its_end(embed, service, images, request.encoding_format, has_left, stop=has_left.set)


async def _answer(
    service: Service,
    http_request: Request,
    model: type[ChatCompletionRequest | CompletionRequest | ResponseRequest],
    form: type[ChatReply | CompletionReply | ResponseReply],
) -> Response:
    """Answer a request.

    Args:
        model: the model of its body.
        form: makes the response from the answers.

    Raises:
        APIError: if the request cannot be answered.
    """
    with contextlib.ExitStack() as stack:
        answer = stack.enter_context(Answer(service))
        with Body(service) as body:  # body and request are freed at the end of this block
            request = await _read(service, http_request, body, model)
            stack.enter_context(service.place(request.count))
            await _unless_gone(http_request, answer.begin(request))
            reply = form(service, request)
            del request
        if reply.streams:
            return EventStream(reply.events(answer), stack.pop_all())
        return JSONResponse(reply.whole(await _unless_gone(http_request, answer.whole()), answer.usage()))


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Wait for the result of some work, and cancel it if the client disconnects first.

    Raises:
        APIError: if the client disconnects.
    """

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answered = asyncio.create_task(work)
    tasks = [answered, asyncio.create_task(until_gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not answered.done():
            raise APIError("The client has closed the connection.")
        return answered.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

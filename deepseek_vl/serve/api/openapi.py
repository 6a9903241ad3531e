"""The description in `/openapi.json`: the requests and answers of every route."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from deepseek_vl.serve.api.errors import ErrorBody
from deepseek_vl.serve.api.events import EventStream
from deepseek_vl.serve.api.fields import Strict
from deepseek_vl.serve.api.service import Service

REF = "#/components/schemas/{model}"
EVENT = {
    "type": "object",
    "description": "Each event's data: JSON of a piece of the answer or of an error, and where OpenAI's API has it "
    "[DONE] as the last.",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
ABOUT = {
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


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The description of some error statuses, as a route's `responses`."""
    return {status: {"model": ErrorBody, "description": ABOUT[status]} for status in statuses}


def takes(service: Service, model: type[Strict], streams: bool = False, waits: bool = True) -> dict[str, Any]:
    """Arguments for a route, which describe its body and its answers.

    Args:
        model: the body's.
        streams: whether the route may answer by events.
        waits: whether a request needs a place in the queue.
    """
    keyed = {} if service.key is None else errors(401, 429)
    events = {200: {"content": {EventStream.media_type: {"schema": EVENT}}}} if streams else {}
    example = {"model": service.name, **model.example}
    content = {"application/json": {"schema": {"$ref": REF.format(model=model.__name__)}, "example": example}}
    return {
        "responses": {**events, **keyed, **errors(400, 404, 413, 415, 503, *([429] if waits else []))},
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }


def describe(app: FastAPI, service: Service, models: Sequence[type[Strict]]) -> None:
    """Have an app describe its routes, and the models of their bodies."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemas = schema["components"]["schemas"]
            for model in models:
                request = _schema(model, service.name)
                schemas |= {**request.pop("$defs", {}), model.__name__: request}
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)  # FastAPI's own, for parameters that may be wrong
                    if service.key is not None and path != "/health":
                        operation["security"] = [{"key": []}]
            if service.key is not None:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi


def _schema(model: type[Strict], served: str) -> dict[str, Any]:
    """The JSON schema of a request's body, with its parts' under `$defs`."""
    schema = model.model_json_schema(ref_template=REF)
    name = schema["properties"]["model"]
    for branch in name.get("anyOf", [name]):
        if branch.get("type") == "string":
            branch["const"] = served
    return schema

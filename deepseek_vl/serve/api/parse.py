"""Parsing a request's body into its model, within limits, with an error that names what is wrong."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from deepseek_vl.engine.limits import RequestLimits
from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.api.fields import Strict

Body = TypeVar("Body", bound=Strict)

_TOKEN = re.compile(
    rb"""
    (?P<separator> [\s,:]++ )
    | (?P<open> [\[{] )
    | (?P<close> [\]}] )
    | (?P<string> "(?:[^"\\]++|\\.)*+"? )
    | (?P<other> [^\s"\[\]{},:]++ )
    """,
    re.VERBOSE | re.DOTALL,
)


def parse(body: bytes | bytearray, model: type[Body], limits: RequestLimits | None = None) -> Body:
    """Parse a request's body into its model. A large body takes long, so call it in a thread.

    Args:
        model: what the body should be.
        limits: those of JSON; None for the defaults.

    Raises:
        APIError: naming the first field that is wrong; or if it is no JSON, or too much of it.
    """
    _check_shape(body, limits or RequestLimits())
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
        if b"\\u" in body:  # the only way to write a lone surrogate, which is no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        raise APIError("The body is not JSON in UTF-8.") from error
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
    field = _cut(".".join(_path(problem["loc"]))) or None
    if problem["type"] == "extra_forbidden":
        raise APIError(f"Unsupported parameter {field!r}.", field, "unsupported_parameter")
    where = f"{field!r}: " if field else "The request: "
    what = problem["msg"]
    if problem["type"] == "union_tag_invalid":  # whose message repeats the tag, however long
        what = f"{problem['ctx']['discriminator']} should be one of {problem['ctx']['expected_tags']}"
    raise APIError(f"{where}{what}.", field, "invalid_value")


_UNIONS = ("response_format", "format")
_LISTS_OF_UNIONS = ("messages", "content", "prompt")


def _path(loc: Sequence[str | int]) -> list[str]:
    """The path of a field in the request, without pydantic's tags of unions ("user", "text"), which are not fields."""

    def is_tag(i: int) -> bool:
        if isinstance(loc[i], int) or i == 0:
            return False
        return loc[i - 1] in _UNIONS or (isinstance(loc[i - 1], int) and loc[i - 2] in _LISTS_OF_UNIONS)

    return [str(item) for i, item in enumerate(loc) if not is_tag(i)]


def _check_shape(body: bytes | bytearray, limits: RequestLimits) -> None:
    """Refuse a body that would take long to decode or validate, before doing so.

    Raises:
        APIError: for too many values or backslashes, values nested too deep, or too long numbers.
    """
    if body.count(b"\\") > limits.json_escapes:
        raise APIError(f"The body has more than {limits.json_escapes} backslashes; send its characters as they are.")
    values = depth = 0
    for token in _TOKEN.finditer(body):
        match token.lastgroup:
            case "separator":
                continue
            case "close":
                depth -= 1
                if depth < 0:
                    raise APIError("The body is not JSON in UTF-8.")
                continue
            case "open":
                depth += 1
            case "other" if token.end() - token.start() > limits.json_digits:
                raise APIError(f"The body is not JSON, or has a number of more than {limits.json_digits} digits.")
        values += 1
        if depth > limits.json_depth:
            raise APIError(f"The body is nested deeper than {limits.json_depth} levels.")
        if values > limits.json_values:
            message = f"The body has more than {limits.json_values} names and values; send fewer messages."
            raise APIError(message, code="too_many_values")


def _cut(name: str) -> str:
    """A name that a client chose, short enough for an answer."""
    return name if len(name) <= 64 else f"{name[:64]}…"


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):  # 1e999, which would be Infinity in an answer
        raise APIError(f"The body has a number that is too large: {_cut(number)}.")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")

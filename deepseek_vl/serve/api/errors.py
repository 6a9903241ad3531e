"""Errors in OpenAI's shape. Their texts are ours: what a library says may tell a stranger about the machine."""

from typing import Any

from fastapi.responses import JSONResponse


class APIError(Exception):
    """An answer with an error status.

    Args:
        message: one clear sentence for the client.
        param: the request's field that is wrong.
        code: a word for programs.
        headers: of the answer.
    """

    status = 500
    type = "server_error"

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
    ):
        super().__init__(message)
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The error object."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


class BadRequest(APIError):
    """400: the request cannot be served as it is."""

    status = 400
    type = "invalid_request_error"


class Unauthorized(BadRequest):
    """401: the key is missing or wrong."""

    status = 401


class NotFound(BadRequest):
    """404: no such route or model."""

    status = 404


class MethodNotAllowed(BadRequest):
    """405: another method."""

    status = 405


class TooLarge(BadRequest):
    """413: the body is too long."""

    status = 413


class Overloaded(APIError):
    """429: too many requests wait already."""

    status = 429
    type = "rate_limit_error"


class Unavailable(APIError):
    """503: the server is going down."""

    status = 503

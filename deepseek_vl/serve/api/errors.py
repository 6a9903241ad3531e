"""Errors in OpenAI's shape. Their texts are our own, since a library's may reveal something about the machine."""

from typing import Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel


class ErrorObject(BaseModel):
    """What was wrong: a sentence, what kind of error, the request's field, and a word for programs."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer with an error status."""

    error: ErrorObject


class APIError(Exception):
    """An answer with an error status.

    Args:
        message: one clear sentence for the client.
        param: the request's field that is wrong.
        code: a word for programs.
        status: HTTP's, below 500 for what the client can correct.
        headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The answer's body, see `ErrorBody`."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer: status, headers and body."""
        return JSONResponse(self.body(), self.status, self.headers)

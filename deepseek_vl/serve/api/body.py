"""Reading requests' bodies within the server's limits."""

import asyncio

from fastapi import Request
from starlette.requests import ClientDisconnect

from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.api.service import Service


class Body:
    """A request's body, as a context manager. Leaving it returns the body's bytes to the server's budget."""

    def __init__(self, service: Service):
        self._service = service
        self._size = 0

    def __enter__(self) -> "Body":
        return self

    def __exit__(self, *error: object) -> None:
        self._service.bodies_bytes -= self._size

    async def read(self, request: Request) -> bytearray:
        """Read the body's bytes.

        Raises:
            APIError: if the body is not declared as JSON, is too large, alone or with others, or arrives too slowly.
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

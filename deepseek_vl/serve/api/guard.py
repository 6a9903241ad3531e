"""The middleware in front of every route: it checks the key, and counts the answers."""

import hmac
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.api.service import Service
from deepseek_vl.serve.listening import Patience


class Guard:
    """Middleware that checks the key before anything else, and counts the answers."""

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
        # The path itself: a client can falsify `Request.url`, which is made from the path and the Host header.
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

"""Server-sent events."""

import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any], kind: str | None = None) -> bytes:
    """One event, with its kind's name if it has one."""
    name = b"" if kind is None else f"event: {kind}\n".encode()
    return name + b"data: " + json.dumps(data, ensure_ascii=False).encode("utf-8") + b"\n\n"


def new_head(prefix: str, model: str) -> dict[str, Any]:
    """What every answer begins with; its id has a prefix."""
    return {"id": f"{prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


class EventStream(StreamingResponse):
    """Server-sent events; `stack` is left behind the last, or when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], stack: contextlib.ExitStack):
        super().__init__(events, headers={"Cache-Control": "no-store"})
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stack:
            await super().__call__(scope, receive, send)

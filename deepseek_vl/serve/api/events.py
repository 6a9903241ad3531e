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
    """The fields that every answer begins with: an id with this prefix, the time, and the model."""
    return {"id": f"{prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


class EventStream(StreamingResponse):
    """A response of server-sent events; `stack` is closed after the last one, or when the client disconnects."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], stack: contextlib.ExitStack):
        super().__init__(events, headers={"Cache-Control": "no-store"})
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stack:
            await super().__call__(scope, receive, send)

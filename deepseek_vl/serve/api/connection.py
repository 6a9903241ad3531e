"""Close connections whose clients neither send nor read for too long."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from deepseek_vl.engine.limits import RequestLimits


def connections(limits: RequestLimits) -> type[H11Protocol]:
    """A protocol for `uvicorn.Config`.

    Args:
        limits: `head_seconds` and `send_seconds` are used.
    """

    class Connection(H11Protocol):
        """One connection. (uvicorn itself closes those that stay idle after an answer.)"""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self._head: asyncio.TimerHandle | None = None
            self._taking: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._watch()

        def connection_lost(self, error: Exception | None) -> None:
            for timer in (self._head, self._taking):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(error)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def _watch(self) -> None:
            """Start or stop the timer for a request's head, or for the rest of a body that has been answered."""
            if self.conn.our_state not in (h11.IDLE, h11.DONE):
                if self._head is not None:
                    self._head.cancel()
                    self._head = None
            elif self._head is None:
                self._head = self.loop.call_later(limits.head_seconds, self.transport.close)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._taking = self.loop.call_later(limits.send_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._taking is not None:
                self._taking.cancel()

    return Connection

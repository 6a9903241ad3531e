"""What the servers share: where they listen, the names they answer to, delays after wrong passwords, and shutting down.

Imports nothing heavy.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import socket
import threading
from collections.abc import Collection
from typing import TYPE_CHECKING

from deepseek_vl.engine.limits import RequestLimits

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

END_SECONDS = 15
"""How many seconds a server that was told to stop may take to end, once its answers have ended."""

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^\s/:?#@\[\]]+|\[[0-9a-f:.]+\])(?::([0-9]+))?")
_HOST = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::[0-9]*)?")


def add_listening(parser: argparse.ArgumentParser, port: int) -> None:
    """Add the arguments that say where a server listens.

    Args:
        port: the default.
    """
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=port, help="(default: %(default)s; 0 for any that is free)")
    add(
        "--allowed_host", action="append", default=[], metavar="NAME",
        help="a name by which clients may ask for the server, besides this machine's own; may be repeated",
    )  # fmt: skip


def check_port(host: str, port: int) -> None:
    """Check that a server can listen at a host's port, before anything that takes long, such as loading a model.

    Raises:
        ValueError: if it cannot.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port} is not between 0 and 65535.")
    for family, *_, address in _addresses(host, port):
        try:
            socket.create_server(address[:2], family=family).close()
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(f"--port {port} of {host} cannot be listened on: {reason}; choose another.") from error


def names_of(host: str, allowed: Collection[str] = ()) -> frozenset[str] | None:
    """The names that a server answers to; None for any name, if other machines can reach it and `allowed` is empty.

    A page in a browser can have its own name resolve to this machine (DNS rebinding), and then read what a server
    answers. But the Host header of its requests still has the page's name.

    Args:
        host: where the server listens.
        allowed: further names.

    Raises:
        ValueError: for a host that cannot be found, or an allowed name that is not valid.
    """
    for name in allowed:
        if not _is_address(name) and re.fullmatch(r"[^\s/:\[\]]+", name) is None:
            raise ValueError(f"--allowed_host {name} is no name: it has no scheme, port or path.")
    is_local = all(ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for *_, address in _addresses(host))
    if not is_local and not allowed:
        return None
    return frozenset(_canonical(name) for name in ("localhost", "127.0.0.1", "::1", host, *allowed))


def checked_origin(origin: str) -> str:
    """An origin of pages as browsers write it: in lower case, without the scheme's own port.

    Args:
        origin: a scheme, a host and perhaps a port; or `*` for all; or `null`, for pages that are files.

    Raises:
        ValueError: if it is no origin.
    """
    if origin in ("*", "null"):
        return origin
    match = _ORIGIN.fullmatch(origin.strip().lower())
    if match is None:
        raise ValueError(f"--allow_origin {origin} is no origin: it is as http://localhost:3000, without a path, or *.")
    scheme, host, port = match.groups()
    return f"{scheme}://{host}" + ("" if port in (None, {"http": "80", "https": "443"}.get(scheme)) else f":{port}")


def _addresses(host: str, port: int = 0) -> list[tuple]:
    try:
        return socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host} cannot be found.") from error


def _is_address(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(_unwrapped(name)))
    return False


def _unwrapped(name: str) -> str:
    return name.removeprefix("[").removesuffix("]").removesuffix(".").lower()


def _canonical(name: str) -> str:
    """A name or an address in a single spelling, for comparison."""
    name = _unwrapped(name)
    return str(ipaddress.ip_address(name)) if _is_address(name) else name


def _name_in(header: str) -> str | None:
    """The name in a Host header, without the port."""
    match = _HOST.fullmatch(header)
    return None if match is None or "/" in header else _canonical(match[1])


class OwnNames:
    """Middleware that refuses requests whose Host header is not one of the server's names.

    Args:
        names: as `names_of` gives them.
        refusal: the app that answers requests for other names.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str], refusal: ASGIApp):
        self.app = app
        self._names = names
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] in ("http", "websocket"):
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            if len(hosts) != 1 or _name_in(hosts[0]) not in self._names:
                app = self._refusal
        await app(scope, receive, send)


class Patience:
    """Delays clients that gave a wrong key or password, to slow down guessing. Other clients are not delayed.

    Args:
        limits: those whose names begin with `refusal` are used.
    """

    def __init__(self, limits: RequestLimits):
        self._limits = limits
        self._waiting = 0

    async def wait(self) -> bool:
        """Wait as long as a refused client must; returns False at once if too many are waiting already."""
        if self._waiting >= self._limits.refusals:
            return False
        self._waiting += 1
        try:
            await asyncio.sleep(self._limits.refusal_seconds)
        finally:
            self._waiting -= 1
        return True


def end_within(seconds: float) -> None:
    """End the process with exit code 1 if it still runs after some seconds."""

    def end() -> None:
        logger.error("The server has not ended within %g seconds, and is broken off.", seconds)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()

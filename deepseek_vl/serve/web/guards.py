"""Guards of the page's server: against fetching addresses for strangers, large bodies, and guessing passwords."""

import asyncio
import time
from pathlib import Path

import gradio as gr
from gradio.components import Component
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek_vl.engine.limits import PAGE_BODY_BYTES, PAGE_LIMITS
from deepseek_vl.serve.listening import Patience


def take_no_addresses(component: Component) -> None:
    """Make a component refuse web addresses, which Gradio would download if a hand-made request has them.

    A method of the component is replaced, because for a subclass Gradio would write a stub file beside its module.
    """
    take = component.async_move_resource_to_block_cache

    async def guarded(url_or_file_path: str | Path | None) -> str | None:
        if str(url_or_file_path).lower().startswith(("http:", "https:")):
            raise gr.Error("Images come as files, not by their address.")
        return await take(url_or_file_path)

    component.async_move_resource_to_block_cache = guarded


class BoundedBodies:
    """Middleware that refuses requests whose body is too large, or does not arrive in time."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_upload = scope["path"].endswith("/upload")
        most = PAGE_LIMITS.images * PAGE_LIMITS.body_bytes if is_upload else PAGE_BODY_BYTES
        deadline = time.monotonic() + PAGE_LIMITS.body_seconds * (PAGE_LIMITS.images if is_upload else 1)
        size, is_whole = 0, False

        def refusal(status: int, message: str) -> Exception:
            # With this one, Gradio deletes what has come of an upload.
            return MultiPartException(message) if is_upload else HTTPException(status, message)

        async def bounded() -> Message:
            nonlocal size, is_whole
            if is_whole:  # what comes now is the client's leaving
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError as error:
                raise refusal(408, "The body did not arrive in time.") from error
            size += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if size > most:
                raise refusal(413, f"The body is larger than {most} bytes, the maximum allowed size.")
            return message

        await self.app(scope, bounded, send)


class SlowLogin:
    """Middleware that delays the answer to a wrong password."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self._patience = Patience(PAGE_LIMITS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def slowly(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                await self._patience.wait()
            await send(message)

        is_login = scope["type"] == "http" and scope["path"].rstrip("/").endswith("/login")
        await self.app(scope, receive, slowly if is_login else send)

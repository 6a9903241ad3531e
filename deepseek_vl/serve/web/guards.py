"""Guards of the page's server: against fetching addresses for strangers, and against guessing passwords."""

from pathlib import Path

import gradio as gr
from gradio.components import Component
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek_vl.engine.limits import PAGE_LIMITS
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

"""The page: its layout and its looks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.limits import PAGE_ANSWERS, PAGE_LIMITS
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.models import VLChatProcessor
from deepseek_vl.serve.arguments import SAMPLING
from deepseek_vl.serve.listening import OwnNames, Patience
from deepseek_vl.serve.web.chat import WebChat

TITLE = "DeepSeek-VL"
IMAGES = Path(__file__).resolve().parents[3] / "images"
EXAMPLES = (
    ("Describe the image.", ("shapes.png",)),
    ("Which bar is tallest?", ("chart.png",)),
    ("Describe each stage of this image.", ("training_pipelines.png",)),
    ("What does it say?", ("word.png",)),
    ("Which image has the blue star?", ("shapes.png", "more_shapes.png")),
)
LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
DEFAULTS = GenerationSettings(temperature=0.1, max_new_tokens=2048)
"""Where the sliders stand at first, as the reference's do."""
CSS = """
#chat { height: clamp(20rem, calc(100dvh - 22rem), 60rem) !important; }
#status { min-height: 0; }
#status p { color: var(--body-text-color-subdued); margin: 0; }
.controls { gap: .5rem; }
.controls button { min-width: 6.5rem; }
@media (max-width: 640px) {
  #chat { height: 58dvh !important; }
  .controls button { min-width: calc(50% - .5rem); }
}
"""


def _take_no_addresses(box: gr.MultimodalTextbox) -> None:
    """Keep Gradio from downloading what a hand-made request names by its address.

    Of this one box: a subclass, which would do as well, has Gradio write a stub file beside its module.
    """
    take = box.async_move_resource_to_block_cache

    async def guarded(url_or_file_path: str | Path | None) -> str | None:
        if str(url_or_file_path).lower().startswith(("http:", "https:")):
            raise gr.Error("Images come as files, not by their address.")
        return await take(url_or_file_path)

    box.async_move_resource_to_block_cache = guarded


def create_page(
    models: Mapping[str, tuple[Engine, VLChatProcessor]], settings: GenerationSettings = DEFAULTS
) -> gr.Blocks:
    """The page for some models.

    Args:
        models: an engine and its processor, by the name that users choose it by.
        settings: where the sliders stand at first.
    """
    chat = WebChat(models)
    # Uploads are looked for every hour, and deleted after a day.
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as page:
        turns = gr.State()
        gr.Markdown(f"# {TITLE}\nShow it pictures, and talk about them.")
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                chatbot = gr.Chatbot(
                    show_label=False,
                    elem_id="chat",
                    latex_delimiters=LATEX,
                    buttons=["copy", "copy_all"],
                    feedback_options=None,
                    placeholder="Add one or more images below, and ask about them.",
                )
                status = gr.Markdown(elem_id="status")
                message = gr.MultimodalTextbox(
                    show_label=False,
                    elem_id="message",
                    file_types=["image"],
                    file_count="multiple",
                    sources=["upload"],
                    submit_btn=False,
                    placeholder="Write a message; drop, paste or upload images",
                    max_plain_text_length=100_000,
                    autofocus=True,
                )
                _take_no_addresses(message)
                with gr.Row(elem_classes="controls"):
                    send = gr.Button("Send", variant="primary", size="md")
                    stop = gr.Button("Stop", variant="stop", size="md")
                    regenerate = gr.Button("Regenerate", size="md")
                    remove = gr.Button("Remove Last Turn", size="md")
                    new = gr.Button("New Conversation", size="md")
                examples = [
                    [{"text": text, "files": [str(IMAGES / name) for name in names]}]
                    for text, names in EXAMPLES
                    if all((IMAGES / name).is_file() for name in names)
                ]
                if examples:  # not in an installation without the checkout
                    gr.Examples(examples, [message], label="Examples")
            with gr.Column(scale=1, min_width=320), gr.Accordion("Settings", open=True):
                controls = [
                    gr.Dropdown(list(models), value=next(iter(models)), label="Model"),
                    *(_slider(p.label, *p.slider, getattr(settings, name)) for name, p in SAMPLING.items()),
                    _slider("Max generation tokens", 0, 4096, 8, settings.max_new_tokens),
                    _slider("Max history tokens", 0, 4096, 128, 4096),
                ]
        answering = {
            "concurrency_id": "answers",
            "concurrency_limit": PAGE_ANSWERS,
            "trigger_mode": "multiple",  # so that a second message is told to wait
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        gr.on(
            [message.submit, send.click],
            chat.send,
            [message, turns, *controls],
            [turns, chatbot, status, message],
            **answering,
        )
        regenerate.click(chat.regenerate, [turns, *controls], [turns, chatbot, status], **answering)
        quick = {"queue": False, "api_visibility": "private"}
        remove.click(chat.remove_last, [turns], [turns, chatbot, status], **quick)
        gr.on(
            [new.click, chatbot.clear],
            chat.new_conversation,
            None,
            [turns, chatbot, status, message],
            **quick,
        )
        stop.click(chat.stop, **quick)
        page.unload(chat.stop)
    return page.queue(max_size=PAGE_LIMITS.waiting)


def _slider(label: str, least: float, most: float, step: float, value: float) -> gr.Slider:
    return gr.Slider(least, max(most, value), value, step=step, label=label)


class _SlowLogin:
    """Middleware that has whoever gives a wrong password wait for the answer."""

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


def launch(
    page: gr.Blocks,
    host: str,
    port: int,
    auth: tuple[str, str] | None = None,
    names: frozenset[str] | None = None,
    **options: Any,
) -> None:
    """Serve a page as it is meant to look, until the process is told to stop.

    Args:
        names: that the server answers to, see `names_of`; None for all.
        options: further arguments of `gr.Blocks.launch`.

    Raises:
        OSError: if the port is not free.
    """
    middleware = [Middleware(_SlowLogin)]
    if names is not None:
        refusal = PlainTextResponse("This server does not go by that name; see --allowed_host.\n", 421)
        middleware.insert(0, Middleware(OwnNames, names=names, refusal=refusal))
    page.launch(
        server_name=host,
        server_port=port,
        auth=auth,
        max_threads=PAGE_ANSWERS + 16,
        max_file_size=PAGE_LIMITS.body_bytes,
        app_kwargs={"middleware": middleware},
        # No fonts and no scripts from elsewhere: the page works without the internet.
        theme=gr.themes.Default(
            primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=CSS,
        footer_links=[],
        **options,
    )

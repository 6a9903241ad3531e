"""The web page: its layout and style, and serving it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.limits import PAGE_ANSWERS, PAGE_LIMITS
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.models import VLChatProcessor
from deepseek_vl.serve.arguments import PAGE_DEFAULTS, SAMPLING
from deepseek_vl.serve.listening import OwnNames
from deepseek_vl.serve.web.chat import WebChat
from deepseek_vl.serve.web.guards import BoundedBodies, SlowLogin, take_no_addresses

TITLE = "DeepSeek-VL"
INVITATION = "## Show it pictures\nand talk about them. Add your own below, or begin with one of these."
HERE = Path(__file__).resolve().parent
IMAGES = HERE.parents[2] / "images"
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
MOST_TOKENS = 4096
"""The maximum of the sliders of tokens; the model's positions, if those are fewer."""

GIVE_BACK = """(kept, box) =>
    kept?.[0]?.unsent && !box?.text && !box?.files?.length ? kept[0].unsent : {__type__: "update"}"""
"""JavaScript that puts a message without an answer back into the message box, if that is empty."""


def create_page(
    models: Mapping[str, tuple[Engine, VLChatProcessor]], settings: GenerationSettings = PAGE_DEFAULTS
) -> gr.Blocks:
    """Build the page for some models.

    Args:
        models: an engine and its processor, by the name that users choose it by.
        settings: the sliders' initial values.
    """
    chat = WebChat(models)
    # Every hour, uploads that are older than a day are deleted.
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, fill_height=True, delete_cache=(3600, 86400)
    ) as page:
        conversation = gr.State()
        with gr.Sidebar(open=False, elem_id="conversations-side"):
            kept = _part("conversations")
            take_no_addresses(kept)
        with gr.Sidebar(open=False, position="right", elem_id="settings-side"):
            gr.Markdown("## Settings")
            controls = _controls(models, settings)
            colours = gr.Radio(["System", "Light", "Dark"], value="System", label="Colours")
        with gr.Row(elem_id="head"):
            gr.Markdown(f"# {TITLE}")
            new = gr.Button("New Conversation", size="sm", elem_id="new")
        look = gr.Button("Where it looked", elem_id="look")
        chatbot = gr.Chatbot(
            show_label=False,
            elem_id="chat",
            height=None,
            scale=1,
            latex_delimiters=LATEX,
            buttons=["copy", "copy_all", look],
            editable="user",
            group_consecutive_messages=False,
            allow_file_downloads=False,
            allow_tags=False,
            feedback_options=None,
            placeholder=INVITATION,
            examples=_examples(),
        )
        status = gr.Markdown(elem_id="status")
        message = gr.MultimodalTextbox(
            show_label=False,
            elem_id="message",
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            placeholder="Write a message",
            max_plain_text_length=100_000,
            autoscroll=False,
        )
        take_no_addresses(message)
        looked = _part("looked")

        shown = [conversation, chatbot, kept, status, message]
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        answering: dict[str, Any] = {
            "concurrency_id": "answers",
            "concurrency_limit": PAGE_ANSWERS,
            "trigger_mode": "multiple",  # so that a second message is told to wait
            **hidden,
        }
        quick: dict[str, Any] = {"queue": False, **hidden}
        sent = message.submit(
            chat.send, [message, conversation], shown, concurrency_limit=None, trigger_mode="multiple", **hidden
        )
        for answer in (
            sent.then(chat.answer, [conversation, *controls], shown, **answering),
            chatbot.retry(chat.regenerate, [conversation, *controls], shown, **answering),
            chatbot.edit(chat.edit, [conversation, *controls], shown, **answering),
        ):
            settled = answer.then(chat.settle, None, message, **quick)
            settled.then(None, [kept, message], message, js=GIVE_BACK)
        chatbot.undo(chat.remove_last, conversation, shown, **quick)
        for begin in (new.click, chatbot.clear, kept.forget):
            begin(chat.new_conversation, None, shown, **quick)
        kept.open(chat.open, [kept, conversation, message], shown, **hidden)
        message.stop(chat.stop, **quick)
        look.click(
            chat.look, [conversation, *controls], looked, concurrency_id="looking", concurrency_limit=1, **hidden
        )

        def fill(event: gr.SelectData) -> dict[str, Any]:
            offered: Any = chatbot.examples  # with their files as Gradio has them
            example = offered[event.index]
            return {"text": example["text"], "files": [file["path"] for file in example["files"]]}

        chatbot.example_select(fill, None, message, **quick)
        model, *_, max_new_tokens, max_history_tokens = controls
        tokens = [max_new_tokens, max_history_tokens]

        def limit(name: str, *values: int) -> list[dict[str, Any]]:
            most = min(MOST_TOKENS, models[name][0].positions)
            return [gr.update(maximum=most, value=min(value, most)) for value in values]

        model.change(limit, [model, *tokens], tokens, **quick)
        colours.change(None, colours, None, js="(choice) => chooseColours(choice)")
        page.load(None, None, colours, js="() => localStorage.getItem('deepseek-vl-colours') ?? 'System'")
        page.unload(chat.stop)
    return page.queue(max_size=PAGE_LIMITS.waiting)


def _controls(models: Mapping[str, tuple[Engine, VLChatProcessor]], settings: GenerationSettings) -> list[Any]:
    """The settings' components, in the order in which `WebChat` takes them."""
    name = next(iter(models))
    positions = models[name][0].positions
    most = min(MOST_TOKENS, positions)
    return [
        gr.Dropdown(list(models), value=name, label="Model"),
        *(_slider(p.label, *p.slider, getattr(settings, name)) for name, p in SAMPLING.items()),
        _slider("Max generation tokens", 8, most, 8, min(settings.max_new_tokens, positions)),
        _slider("Max history tokens", 0, most, 128, most),
    ]


def _slider(label: str, least: float, most: float, step: float, value: float) -> gr.Slider:
    return gr.Slider(least, max(most, value), value, step=step, label=label)


def _examples() -> Any:
    """The examples that an empty chat offers; None in an installation without the checkout's images."""
    return [
        {"text": text, "files": [str(IMAGES / name) for name in names]}
        for text, names in EXAMPLES
        if all((IMAGES / name).is_file() for name in names)
    ] or None


def _part(name: str) -> gr.HTML:
    """A part of the page that its own script draws."""
    script = (HERE / f"{name}.js").read_text(encoding="utf-8")
    return gr.HTML(None, html_template="", js_on_load=script, apply_default_css=False, elem_id=name)


def launch(
    page: gr.Blocks,
    host: str,
    port: int,
    auth: tuple[str, str] | None = None,
    names: frozenset[str] | None = None,
    **options: Any,
) -> str:
    """Serve a page with its own style, in background threads; `page.block_thread()` waits until it is told to stop.

    Args:
        names: those that the server answers to, see `names_of`; None for all.
        options: further arguments of `gr.Blocks.launch`.

    Returns:
        The page's address, for users.

    Raises:
        OSError: if the port is not free.
    """
    middleware = [Middleware(BoundedBodies), Middleware(SlowLogin)]
    if names is not None:
        refusal = PlainTextResponse("This server does not go by that name; see --allowed_host.\n", 421)
        middleware.insert(0, Middleware(OwnNames, names=names, refusal=refusal))
    options = {"quiet": True, "prevent_thread_lock": True, **options}
    _, local, public = page.launch(
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
        css_paths=HERE / "page.css",
        head=f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        footer_links=[],
        **options,
    )
    return (public or local).rstrip("/")

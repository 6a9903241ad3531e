"""The terminal: an interactive chat, or one answer on standard output."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from deepseek_vl.command_line import OneLineParser, one_line, starting
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.serve.arguments import DEFAULT_MODEL, add_arguments, check_text, open_engine, settings_of
from deepseek_vl.serve.terminal.chat import TerminalChat, help_text
from deepseek_vl.utils.conversation import IMAGE_TAG

if TYPE_CHECKING:
    from PIL import Image

    from deepseek_vl.engine.chat import ChatSession
    from deepseek_vl.serve.terminal.screen import Screen


def build_parser() -> argparse.ArgumentParser:
    """The command line of `cli_chat.py`."""
    parser = OneLineParser(prog=_name(), description="Chat with a DeepSeek-VL model in the terminal.")
    add_arguments(parser, GenerationSettings(temperature=0.2), default=DEFAULT_MODEL)
    parser.add_argument(
        "--image", nargs="+", action="extend", default=[], metavar="PATH",
        help="images for the first message: paths, web addresses, or - for standard input",
    )  # fmt: skip
    parser.add_argument("--prompt", metavar="TEXT", help="answer this one message on standard output, and exit")
    parser.add_argument(
        "--json", action="store_true", help="with --prompt: answer, finish reason and token counts as a JSON object"
    )
    return parser


def _name() -> str:
    """The name of the command that was started."""
    name = Path(sys.argv[0]).stem
    return name if name == "deepseek-vl-chat" else "cli_chat.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the terminal chat; returns the exit code."""
    args = build_parser().parse_args(arguments)
    _open_closed_streams()
    stdin, *outputs = cast(list[io.TextIOWrapper], [sys.stdin, sys.stdout, sys.stderr])
    stdin.reconfigure(errors="surrogateescape")  # see `check_text`
    for stream in outputs:
        stream.reconfigure(errors="replace")  # an answer may have characters that the encoding lacks
    try:
        return _run(args)
    except BrokenPipeError:  # the reader of our output has gone, as in `cli_chat.py ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # whatever it is, a script gets one line
        print(f"{_name()}: error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _open_closed_streams() -> None:
    """Give the process nothing to read, or nowhere to write, where its parent closed a standard stream."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115


def _run(args: argparse.Namespace) -> int:
    # Errors in the arguments are found before the libraries and the model are loaded.
    settings = settings_of(args)
    one_shot = args.prompt is not None
    if one_shot:
        check_text(args.prompt, "--prompt")
    if one_shot and not args.prompt.strip():
        raise ValueError("--prompt is empty.")
    if one_shot and args.prompt.count(IMAGE_TAG) > len(args.image):
        raise ValueError(f"--prompt has {args.prompt.count(IMAGE_TAG)} {IMAGE_TAG} and {len(args.image)} images.")
    if args.json and not one_shot:
        raise ValueError("--json is for --prompt.")
    if "-" in args.image and (not one_shot or args.image.count("-") > 1):
        raise ValueError("--image - reads one image from standard input, and needs --prompt.")
    if not one_shot:
        print(f"Loading {args.model_path} ...", flush=True)
    with starting(), _import_interruptible():
        from deepseek_vl.serve.terminal.attachments import open_image

        images = [open_image(source) for source in args.image]
        _be_quiet(progress=not one_shot and sys.stderr.isatty())
        from deepseek_vl.engine.chat import ChatSession
        from deepseek_vl.serve.terminal.screen import write_pieces

    engine, processor = open_engine(args, args.model_path, progress=print if not one_shot else lambda _: None)
    session = ChatSession(engine, processor, settings)
    if args.json:
        print(json.dumps(_answer_object(args.model_path, session, args.prompt, images), ensure_ascii=False))
    elif one_shot:
        write_pieces(session.ask(args.prompt, images))
    else:
        screen = _pick_screen()
        dtype = str(engine.model.dtype).removeprefix("torch.")
        screen.say(f"It runs on {engine.model.device} in {dtype}.\n\n{help_text(screen.columns)}")
        TerminalChat(session, screen, images).run()
    return 0


def _pick_screen() -> Screen:
    """The screen to chat on: a terminal if input and output are one, plain streams otherwise."""
    capable = os.name == "nt" or os.environ.get("TERM", "dumb") != "dumb"
    if capable and sys.stdin.isatty() and sys.stdout.isatty():
        from deepseek_vl.serve.terminal.rich_screen import TerminalScreen

        state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        return TerminalScreen(Path(os.path.expanduser(state)) / "deepseek_vl" / "history")  # noqa: PTH111
    from deepseek_vl.serve.terminal.screen import PlainScreen

    with contextlib.suppress(ImportError):  # line editing; not on every platform
        import readline  # noqa: F401
    return PlainScreen()


def _answer_object(model_path: str, session: ChatSession, prompt: str, images: list[Image.Image]) -> dict[str, Any]:
    """One answer with its finish reason and token counts, for JSON."""
    text = "".join(session.ask(prompt, images)).strip()
    answer: Any = session.answer
    return {
        "model": model_path,
        "answer": text,
        "finish_reason": answer.finish_reason,
        "usage": {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens},
    }


@contextlib.contextmanager
def _import_interruptible() -> Iterator[None]:
    """Let Ctrl-C end the process at once: inside an import, `KeyboardInterrupt` may be caught and misreported."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _be_quiet(progress: bool) -> None:
    """Keep the libraries' warnings, and their progress bars unless wanted, off the user's terminal."""
    import huggingface_hub.utils.logging
    import transformers.utils.logging

    warnings.simplefilter("ignore")
    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    if not progress:
        transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    raise SystemExit(main())

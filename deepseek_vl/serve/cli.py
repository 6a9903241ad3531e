"""The terminal: an interactive chat, or one answer on standard output."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek_vl.serve.settings import GenerationSettings
from deepseek_vl.utils.command import OneLineParser

if TYPE_CHECKING:
    from PIL import Image

    from deepseek_vl.serve.chat import ChatSession

IMAGE_TAG = "<image_placeholder>"
USER_PROMPT = f"User [{IMAGE_TAG} indicates an image]: "
HELP = f"""\
Write a message and press Enter. Put {IMAGE_TAG} where an image belongs; you are asked for each one's path.
  new    forget the conversation and start again
  help   show this text
  exit   leave (so does Ctrl-D)
Ctrl-C stops an answer, or forgets the message you are writing."""


class _Exit(Exception):
    """The user wants to leave."""


def build_parser() -> argparse.ArgumentParser:
    """The command line of `cli_chat.py`."""
    parser = OneLineParser(prog="cli_chat.py", description="Chat with a DeepSeek-VL model in the terminal.")
    parser.add_argument(
        "--model_path",
        default="deepseek-ai/deepseek-vl-7b-chat",
        help="checkpoint directory, or id on the Hugging Face Hub (default: %(default)s)",
    )
    parser.add_argument("--temperature", type=float, default=0.2, help="0 is greedy decoding (default: %(default)s)")
    parser.add_argument("--top_p", type=float, default=0.95, help="nucleus sampling (default: %(default)s)")
    parser.add_argument(
        "--repetition_penalty", type=float, default=1.1, help="used when sampling (default: %(default)s)"
    )
    parser.add_argument("--max_gen_len", type=int, default=512, help="tokens per answer (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="auto", help="auto, bfloat16, float16, float32 (default: what the device is good at)"
    )
    parser.add_argument(
        "--image", nargs="+", action="extend", default=[], metavar="PATH", help="images for the first message"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="answer this one message on standard output, and exit")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the terminal chat; returns the exit code."""
    args = build_parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # an answer may have characters that the terminal's encoding lacks
    try:
        return _run(args)
    except BrokenPipeError:  # the reader of our output has gone, as in `cli_chat.py ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # whatever it is, a script gets one line
        print(f"cli_chat.py: error: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    # Everything that can be wrong with the arguments is found before the libraries and the model are loaded.
    settings = GenerationSettings(args.max_gen_len, args.temperature, args.top_p, args.repetition_penalty)
    one_shot = args.prompt is not None
    if one_shot and not args.prompt.strip():
        raise ValueError("--prompt is empty.")
    if one_shot and args.prompt.count(IMAGE_TAG) > len(args.image):
        raise ValueError(f"--prompt has {args.prompt.count(IMAGE_TAG)} {IMAGE_TAG} and {len(args.image)} images.")
    if not one_shot:
        print(f"Loading {args.model_path} ...", flush=True)
    with _import_interruptible():
        from deepseek_vl.utils.io import load_image, load_pretrained_model, pick_device, pick_dtype

        device = pick_device(args.device)
        dtype = pick_dtype(device, args.dtype)
        images = [load_image(path) for path in args.image]
        _be_quiet(progress=not one_shot and sys.stderr.isatty())
        from deepseek_vl.serve.chat import ChatSession

    _, processor, model = load_pretrained_model(args.model_path, device=device, dtype=dtype)
    session = ChatSession(model, processor, settings)
    if one_shot:
        _print_answer(session.ask(args.prompt, images))
    else:
        print(f"It runs on {device} in {str(dtype).removeprefix('torch.')}.\n\n{HELP}")
        _chat(session, images)
    return 0


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


def _chat(session: ChatSession, images: list[Image.Image]) -> None:
    """The interactive loop. `images` belong to the first message."""
    with contextlib.suppress(ImportError):  # line editing and history; not on every platform
        import readline  # noqa: F401
    if images:
        print(f"{len(images)} image(s) will go with your first message.")
    while True:
        try:
            text = _read(USER_PROMPT)
            if text.lower() == "help":
                print(HELP)
            elif text.lower() == "new":
                session.reset()
                print("New conversation.")
            elif text:
                asked = [_read_image(i, text.count(IMAGE_TAG)) for i in range(len(images), text.count(IMAGE_TAG))]
                if _answer(session, text, images + asked):
                    images = []
        except KeyboardInterrupt:  # at a prompt: forget the line
            print()
        except _Exit:
            return


def _read(prompt: str) -> str:
    """One line of input, stripped.

    Raises:
        _Exit: at `exit` and at the end of the input.
    """
    try:
        text = input(prompt).strip()
    except EOFError:
        print()
        raise _Exit from None
    if text.lower() == "exit":
        raise _Exit
    return text


def _read_image(index: int, total: int) -> Image.Image:
    """Ask for the path of one image until there is one that can be read."""
    from deepseek_vl.utils.io import ImageLoadError, load_image

    while True:
        path = _read(f"({index + 1}/{total}) Input the image file path: ")
        if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
            path = path[1:-1].strip()
        if not path:
            continue
        try:
            return load_image(Path(path))
        except ImageLoadError as error:
            print(error)


def _answer(session: ChatSession, text: str, images: list[Image.Image]) -> bool:
    """Print the answer to one message; Ctrl-C stops it, and an error is reported, without ending the chat.

    Returns whether there was no error.
    """
    print("Assistant: ", end="", flush=True)
    try:
        _print_answer(session.ask(text, images))
    except KeyboardInterrupt:
        print("\n[stopped]")
    except Exception as error:
        print(f"\nError: {_one_line(error)}")
        return False
    if session.dropped_turns:
        print(f"[the oldest {session.dropped_turns} turn(s) no longer fit the model's context and were left out]")
    return True


def _print_answer(pieces: Iterator[str]) -> None:
    """Print pieces as they come, without the space that the first begins with."""
    clean: Callable[[str], str] = str.lstrip
    with contextlib.closing(pieces):
        for piece in pieces:
            if shown := clean(piece):
                clean = str
                print(shown, end="", flush=True)
    print()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    raise SystemExit(main())

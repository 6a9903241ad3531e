"""The terminal: an interactive chat, or one answer on standard output."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from deepseek_vl.serve.settings import GenerationSettings
from deepseek_vl.utils.command import OneLineParser, add_compile, add_quantize, starting
from deepseek_vl.utils.rows import IMAGE_TAG

if TYPE_CHECKING:
    from PIL import Image

    from deepseek_vl.serve.chat import ChatSession
    from deepseek_vl.serve.screen import Screen

USER_PROMPT = f"User [{IMAGE_TAG} indicates an image]: "
HELP = f"""\
Write a message and press Enter. An image's path or web address in it brings the image along: type it, paste it, or drop
the file here. Or put {IMAGE_TAG} where an image belongs; you are asked for each one's path.
  retry       answer the last message again
  undo        take the last message and its answer back
  new         forget the conversation and start again
  save FILE   write the conversation to a .json or .jsonl file
  load FILE   go on with a conversation from such a file
  help        show this text
  exit        leave (so does Ctrl-D)
Ctrl-C stops an answer, or forgets the message you are writing."""


class _Exit(Exception):
    """The user wants to leave."""


def build_parser() -> argparse.ArgumentParser:
    """The command line of `cli_chat.py`."""
    parser = OneLineParser(prog="cli_chat.py", description="Chat with a DeepSeek-VL model in the terminal.")
    parser.add_argument(
        "--model_path",
        default="deepseek-ai/deepseek-vl-7b-chat",
        help="checkpoint directory, id on the Hugging Face Hub, or tiny, which comes with the package "
        "(default: %(default)s)",
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
    add_quantize(parser)
    add_compile(parser)
    parser.add_argument(
        "--image", nargs="+", action="extend", default=[], metavar="PATH",
        help="images for the first message: paths, web addresses, or - for standard input",
    )  # fmt: skip
    parser.add_argument("--prompt", metavar="TEXT", help="answer this one message on standard output, and exit")
    parser.add_argument(
        "--json", action="store_true", help="with --prompt: answer, finish reason and token counts as a JSON object"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the terminal chat; returns the exit code."""
    args = build_parser().parse_args(arguments)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # what is typed or answered may have characters that the encoding lacks
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
    if args.json and not one_shot:
        raise ValueError("--json is for --prompt.")
    if "-" in args.image and (not one_shot or args.image.count("-") > 1):
        raise ValueError("--image - reads one image from standard input, and needs --prompt.")
    if not one_shot:
        print(f"Loading {args.model_path} ...", flush=True)
    with starting():
        with _import_interruptible():
            from deepseek_vl.serve.attachments import open_image
            from deepseek_vl.utils.io import check_quantization, load_pretrained_model, pick_device, pick_dtype

            device = pick_device(args.device)
            dtype = pick_dtype(device, args.dtype)
            check_quantization(device, args.quantize)
            if args.compile:
                from deepseek_vl.serve.compiled import check_compile, compile_model

                check_compile(device, args.quantize)
            images = [open_image(source) for source in args.image]
            _be_quiet(progress=not one_shot and sys.stderr.isatty())
            from deepseek_vl.serve.chat import ChatSession
            from deepseek_vl.serve.screen import pick_screen, write_pieces

        _, processor, model = load_pretrained_model(args.model_path, device=device, dtype=dtype, quantize=args.quantize)
    if args.compile:
        compile_model(model, processor, progress=print if not one_shot else lambda _: None)
    session = ChatSession(model, processor, settings)
    if args.json:
        print(json.dumps(_answer_object(args.model_path, session, args.prompt, images), ensure_ascii=False))
    elif one_shot:
        write_pieces(session.ask(args.prompt, images))
    else:
        screen = pick_screen()
        screen.say(f"It runs on {device} in {str(dtype).removeprefix('torch.')}.\n\n{HELP}")
        _Chat(session, screen, images).run()
    return 0


def _answer_object(model_path: str, session: ChatSession, prompt: str, images: list[Image.Image]) -> dict[str, Any]:
    """One answer and what there is to know about it."""
    text = "".join(session.ask(prompt, images)).strip()
    answer = session.answer
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


class _Chat:
    """The interactive loop.

    Args:
        images: belong to the first message.
    """

    def __init__(self, session: ChatSession, screen: Screen, images: list[Image.Image]):
        self.session = session
        self.screen = screen
        self.images = images
        self.unsent = ""  # what could not be sent, to be mended

    def run(self) -> None:
        """Read and answer until the user leaves."""
        if self.images:
            self.screen.say(f"{len(self.images)} image(s) will go with your first message.")
        while True:
            text = ""
            try:
                text = self._read(USER_PROMPT, self.unsent)
                self.unsent = ""
                if text and not self._obey(text):
                    self._send(text)
            except KeyboardInterrupt:  # at a prompt: forget the line
                self.unsent = ""
                self.screen.say("")
            except _Exit:
                return
            except Exception as error:
                self.screen.say(f"Error: {_one_line(error)}")
                self.unsent = "" if text in ("undo", "retry") else text

    def _read(self, prompt: str, default: str = "", path: bool = False) -> str:
        """One line of input, stripped.

        Raises:
            _Exit: at `exit` and at the end of the input.
        """
        try:
            text = self.screen.read(prompt, default, path).strip()
        except EOFError:
            self.screen.say("")
            raise _Exit from None
        if text.lower() == "exit":
            raise _Exit
        return text

    def _obey(self, text: str) -> bool:
        """Whether it was a command, which then is done."""
        say, session = self.screen.say, self.session
        name, _, rest = text.partition(" ")
        match name.lower(), _path(name, rest):
            case "help", "":
                say(HELP)
            case "new", "":
                session.reset()
                say("New conversation.")
            case "undo", "":
                images = len(session.undo()["images"])
                say("The last message" + (f" and its {images} image(s) are" if images else " is") + " taken back.")
            case "retry", "":
                self._answer(session.retry())
            case "save" | "load", "":
                say(f"{name.lower()} needs the name of a .json or .jsonl file.")
            case "save", str(path):
                session.save(path)
                say(f"Saved {len(session.messages) // 2} turn(s) to {path}.")
            case "load", str(path):
                session.load(path)
                say(f"Loaded {len(session.messages) // 2} turn(s) from {path}. The last answer was:")
                self.screen.answer(message["content"] for message in session.messages[-1:])
            case _:
                return False
        return True

    def _send(self, text: str) -> None:
        """Answer a message with its images: those that wait for it, those it names, and those it has tags for."""
        from deepseek_vl.serve.attachments import open_image, take_images

        rest, sources = take_images(text, IMAGE_TAG)
        named = [open_image(source) for source in sources]
        for number, (source, image) in enumerate(zip(sources, named, strict=True), len(self.images) + 1):
            self.screen.say(f"[image {number}: {source}, {image.width}x{image.height}]")
        images = self.images + named
        if not rest:
            self.images = images
            self.screen.say(f"{len(images)} image(s) will go with your next message.")
            return
        total = rest.count(IMAGE_TAG)
        images += [self._read_image(number, total) for number in range(len(images) + 1, total + 1)]
        turns = len(self.session.messages)
        self._answer(self.session.ask(rest, images))
        if len(self.session.messages) > turns:
            self.images = []
        else:  # stopped before the first token
            self.images, self.unsent = images, rest

    def _read_image(self, number: int, total: int) -> Image.Image:
        """Ask for one image until there is one that can be read."""
        from deepseek_vl.serve.attachments import open_image, take_images
        from deepseek_vl.utils.io import ImageLoadError

        while True:
            path = self._read(f"({number}/{total}) Input the image file path: ", path=True)
            try:
                if path == "-":
                    self.screen.say("Standard input has your messages; give a path or a web address.")
                elif path:
                    rest, sources = take_images(path, IMAGE_TAG)
                    return open_image(path.strip("'\"") if rest or len(sources) != 1 else sources[0])
            except ImageLoadError as error:
                self.screen.say(str(error))

    def _answer(self, pieces: Iterator[str]) -> None:
        """Show an answer; Ctrl-C stops it."""
        try:
            self.screen.answer(pieces)
        except KeyboardInterrupt:
            self.screen.say("[stopped]")
        if self.session.dropped_turns:
            self.screen.say(
                f"[the oldest {self.session.dropped_turns} turn(s) no longer fit the model's context and were left out]"
            )


def _path(command: str, rest: str) -> str | None:
    """What stands behind a command's name: nothing, or the path of `save` and `load`; None if it is no command."""
    path = rest.strip()
    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
        path = path[1:-1]
    elif os.name != "nt":
        path = path.replace("\\ ", " ")
    is_path = command.lower() in ("save", "load") and (" " not in path or path.lower().endswith((".json", ".jsonl")))
    return path if is_path or not path else None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    raise SystemExit(main())

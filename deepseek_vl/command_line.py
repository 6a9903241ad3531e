"""What the commands share: errors in one line, exit codes, a log on standard error, a quick start."""

import argparse
import atexit
import contextlib
import errno
import gc
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

EXTRAS = {
    "gradio": "gradio",
    **dict.fromkeys(("fastapi", "httpcore", "prometheus_client", "pydantic", "starlette", "uvicorn"), "serve"),
    **dict.fromkeys(("matplotlib", "peft"), "train"),
}
"""The optional parts of this package that install the packages which some commands need."""


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong argument as one line, with the exit code of every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: error: {message} (see --help)\n")


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int | None],
    arguments: Sequence[str] | None,
) -> int:
    """Parse the arguments, run a command, and return its exit code.

    The code is what `run` returns (0 for None), 1 after bad input or on a full disk, and 130 after Ctrl-C. Other
    exceptions are defects, or a machine's limits (out of memory): they keep their traceback.
    """
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request that Gradio sends itself
    try:
        return run(args) or 0
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if is_disk_full(error):
            message = f"nothing more can be written ({one_line(error)}); make room, then give the same command again"
        elif isinstance(error, OSError) and error.strerror and error.filename:
            message = f"{str(error.filename)!r}: {error.strerror}"
        elif isinstance(error, OSError | ValueError):
            message = str(error)
        elif isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            message = f"this needs the package {error.name}: pip install '.[{EXTRAS[error.name]}]'"
        else:
            raise
        print(f"{parser.prog}: error: {message}", file=sys.stderr)
        return 1


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that led to it, says that a disk or a quota is full.

    Libraries in other languages raise errors of their own, which are no `OSError`: one of safetensors names the
    system's error, one of PyTorch only the writer that failed.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if getattr(cause, "errno", None) in _NO_ROOM or _NO_ROOM_IN_WORDS.search(str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ROOM_IN_WORDS = re.compile(
    rf"os error ({'|'.join(map(str, sorted(_NO_ROOM)))})\b|code: ({'|'.join(map(str, sorted(_NO_ROOM)))})\b"
    "|PytorchStreamWriter failed|inline_container.*unexpected pos"
)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Pause garbage collection while a program imports modules and loads a model, when there is nothing to collect.

    Python's collector would go through hundreds of thousands of new objects again and again. It skips the objects that
    exist at the end of the block until the process ends, unless an exception ended the block.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
        atexit.register(gc.unfreeze)  # libraries complain of what is left when the process ends
    finally:
        if enabled:
            gc.enable()


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `load_pretrained_model`, for commands that load a model for answers."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="auto", help="auto, bfloat16, float16, float32 (default: what the device is good at)"
    )
    parser.add_argument(
        "--quantize", metavar="KIND", help="int8 or int4: faster and smaller, with almost the same answers"
    )


def one_line(error: BaseException) -> str:
    """An error's message in one line; the name of its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def not_negative(text: str) -> int:
    """Parse an argument that must be a whole number, 0 or above."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def positive(text: str) -> int:
    """Parse an argument that must be a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number

"""What the commands share: errors in one line, exit codes, a log on standard error, a quick start."""

import argparse
import atexit
import contextlib
import gc
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong argument as one line, with the exit code of every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: error: {message} (see --help)\n")


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int | None],
    arguments: Sequence[str] | None,
) -> int:
    """Parse the arguments and run a command; returns its exit code (None is 0), 1 after bad input, 130 after Ctrl-C.

    Other exceptions are defects, or a machine's limits (out of memory): they keep their traceback.
    """
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request that Gradio sends itself
    try:
        return run(args) or 0
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        return 130


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """A program imports its modules and loads its model: nothing of that is garbage, so nobody looks for any.

    Python's collector would go through hundreds of thousands of new objects again and again. Those that there are at
    the end it goes through only when the process ends; after an exception as ever.
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
    """The arguments for `load_pretrained_model`, of commands that load a model for answers."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="auto", help="auto, bfloat16, float16, float32 (default: what the device is good at)"
    )
    parser.add_argument(
        "--quantize", metavar="KIND", help="int8 or int4: faster and smaller, with almost the same answers"
    )


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def positive(text: str) -> int:
    """An argument that is a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number

"""Where the chat reads and writes: plain streams without control codes, or (`rich_screen.py`) a terminal."""

import contextlib
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Protocol

ANSWER = "Assistant: "


class Screen(Protocol):
    """What a chat reads from and writes to.

    Attributes:
        columns: how wide it is, in characters.
    """

    @property
    def columns(self) -> int: ...

    def read(self, prompt: str, default: str = "", path: bool = False) -> str:
        """Read a line of input.

        Args:
            prompt: what is asked.
            default: text to begin with, where it can be edited.
            path: whether it is a path rather than a message.

        Raises:
            EOFError: at the end of the input.
            KeyboardInterrupt: at Ctrl-C.
        """

    def say(self, text: str) -> None:
        """Print a line of the program's own."""

    def answer(self, pieces: Generator[str]) -> None:
        """Show the assistant's answer as it comes."""


class PlainScreen:
    """Standard input and output, without control codes."""

    @property
    def columns(self) -> int:
        return shutil.get_terminal_size((120, 24)).columns

    def read(self, prompt: str, default: str = "", path: bool = False) -> str:
        return input(prompt)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def answer(self, pieces: Generator[str]) -> None:
        write_pieces(pieces, ANSWER)


def write_pieces(pieces: Generator[str], label: str = "") -> None:
    """Print an answer as it comes, after a label and without white space at its beginning."""
    begun = False
    try:
        with contextlib.closing(pieces):
            for piece in without_first_space(pieces):
                print(piece if begun else label + piece, end="", flush=True)
                begun = True
    except BaseException:
        if begun:
            print(flush=True)
        raise
    print("" if begun else label, flush=True)


def without_first_space(pieces: Iterable[str]) -> Iterator[str]:
    """An answer's pieces, without white space at the answer's beginning."""
    clean: Callable[[str], str] = str.lstrip
    for piece in pieces:
        if shown := clean(piece):
            clean = str
            yield shown

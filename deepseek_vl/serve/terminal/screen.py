"""What the chat reads from and writes to: plain streams without any control code, or a terminal with its comforts."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

ANSWER = "Assistant: "


class Screen(Protocol):
    """Where a chat takes place."""

    def read(self, prompt: str, default: str = "", path: bool = False) -> str:
        """A line of input.

        Args:
            prompt: what is asked.
            default: text to begin with, where it can be edited.
            path: whether it is a path rather than a message.

        Raises:
            EOFError: at the end of the input.
            KeyboardInterrupt: at Ctrl-C.
        """

    def say(self, text: str) -> None:
        """A line of the program's own."""

    def answer(self, pieces: Iterator[str]) -> None:
        """The assistant's answer, as it comes."""


class PlainScreen:
    """Standard input and output, as they are."""

    def read(self, prompt: str, default: str = "", path: bool = False) -> str:
        return input(prompt)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def answer(self, pieces: Iterator[str]) -> None:
        print(ANSWER, end="", flush=True)
        try:
            write_pieces(pieces)
        except BaseException:
            print(flush=True)
            raise


def write_pieces(pieces: Iterator[str]) -> None:
    """An answer on standard output, without the space that the first piece begins with."""
    with contextlib.closing(pieces):
        for piece in without_first_space(pieces):
            print(piece, end="", flush=True)
    print()


def without_first_space(pieces: Iterable[str]) -> Iterator[str]:
    """An answer's pieces, less the space that the first word's token begins with."""
    clean: Callable[[str], str] = str.lstrip
    for piece in pieces:
        if shown := clean(piece):
            clean = str
            yield shown

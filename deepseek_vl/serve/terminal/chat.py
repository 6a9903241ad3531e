"""The interactive chat in the terminal."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Generator
from typing import TYPE_CHECKING

from deepseek_vl.command_line import one_line
from deepseek_vl.serve.arguments import check_text
from deepseek_vl.utils.conversation import IMAGE_TAG

if TYPE_CHECKING:
    from PIL import Image

    from deepseek_vl.engine.chat import ChatSession
    from deepseek_vl.serve.terminal.screen import Screen

USER_PROMPT = "User: "

INTRODUCTION = (
    "Write a message and press Enter. An image's path or web address in it brings the image along: type it, paste it, "
    f"or drop the file here. Or put {IMAGE_TAG} where an image belongs; you are asked for each one's path."
)
COMMANDS = {
    "retry": "answer the last message again",
    "undo": "take the last message and its answer back",
    "new": "forget the conversation and start again",
    "save FILE": "write the conversation to a .json or .jsonl file",
    "load FILE": "go on with a conversation from such a file",
    "help": "show this text",
    "exit": "leave (so does Ctrl-D)",
}
KEYS = "Ctrl-C stops an answer, or forgets the message you are writing."


def help_text(columns: int) -> str:
    """How the chat is used, wrapped to `columns` characters."""

    def fill(text: str, first: str = "", indent: int = 0) -> str:
        begin = f"{first:<{indent}}"
        return textwrap.fill(text, max(columns, indent + 16), initial_indent=begin, subsequent_indent=" " * indent)

    commands = (fill(meaning, f"  {name}", 14) for name, meaning in COMMANDS.items())
    return "\n".join([fill(INTRODUCTION), *commands, fill(KEYS)])


class _Exit(Exception):
    """The user wants to leave."""


class TerminalChat:
    """The interactive loop.

    Args:
        images: those of the first message.
    """

    def __init__(self, session: ChatSession, screen: Screen, images: list[Image.Image]):
        self.session = session
        self.screen = screen
        self.images = images
        self.unsent = ""  # a message that got no answer, to be edited
        self._has_told_dropped = False

    def run(self) -> None:
        """Read and answer until the user leaves."""
        if self.images:
            self.screen.say(f"{len(self.images)} image(s) will go with your first message.")
        while True:
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
                self.screen.say(f"Error: {one_line(error)}")

    def _read(self, prompt: str, default: str = "", path: bool = False) -> str:
        """One line of input, stripped.

        Raises:
            _Exit: at `exit` and at the end of the input.
            ValueError: for bytes that are not text, unless they may be a path.
        """
        try:
            text = self.screen.read(prompt, default, path).strip()
        except EOFError:
            self.screen.say("")
            raise _Exit from None
        if not path:
            check_text(text, "What you have typed")
        if text.lower() == "exit":
            raise _Exit
        return text

    def _obey(self, text: str) -> bool:
        """Carry out a command; returns whether the line was one."""
        say, session = self.screen.say, self.session
        name, _, rest = text.partition(" ")
        match name.lower(), _path(name, rest):
            case "help", "":
                say(help_text(self.screen.columns))
            case "new", "":
                session.reset()
                self._has_told_dropped = False
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
                self._has_told_dropped = False
                say(f"Loaded {len(session.messages) // 2} turn(s) from {path}. The last answer was:")
                self.screen.answer(message["content"] for message in session.messages[-1:])
            case _:
                return False
        return True

    def _send(self, text: str) -> None:
        """Answer a message with its images: those given before, those it names, and those that its tags ask for.

        A message that gets no answer is not in the conversation: the next prompt begins with it, to be edited.
        """
        self.unsent = text
        from deepseek_vl.serve.terminal.attachments import open_image, take_images

        rest, sources = take_images(text, IMAGE_TAG)
        named = [open_image(source) for source in sources]
        for number, (source, image) in enumerate(zip(sources, named, strict=True), len(self.images) + 1):
            self.screen.say(f"[image {number}: {source}, {image.width}x{image.height}]")
        images = self.images + named
        if not rest:
            self.images, self.unsent = images, ""
            self.screen.say(f"{len(images)} image(s) will go with your next message.")
            return
        total = rest.count(IMAGE_TAG)
        images += [self._read_image(number, total) for number in range(len(images) + 1, total + 1)]
        turns = len(self.session.messages)
        self._answer(self.session.ask(rest, images))
        if len(self.session.messages) > turns:
            self.images, self.unsent = [], ""
        else:  # stopped before the first token
            self.images, self.unsent = images, rest

    def _read_image(self, number: int, total: int) -> Image.Image:
        """Ask for one image until there is one that can be read."""
        from deepseek_vl.imaging.open import ImageLoadError
        from deepseek_vl.serve.terminal.attachments import open_image, take_images

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

    def _answer(self, pieces: Generator[str]) -> None:
        """Show an answer; Ctrl-C stops it."""
        try:
            self.screen.answer(pieces)
        except KeyboardInterrupt:
            self.screen.say("[stopped]")
        if self.session.dropped_turns and not self._has_told_dropped:
            self._has_told_dropped = True
            self.screen.say("[the oldest turns no longer fit the model's context, and are left out from now on]")


def _path(command: str, rest: str) -> str | None:
    """A command's argument: empty, or the path of `save` and `load`; None if the line is no command."""
    path = rest.strip()
    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
        path = path[1:-1]
    elif os.name != "nt":
        path = path.replace("\\ ", " ")
    is_path = command.lower() in ("save", "load") and (" " not in path or path.lower().endswith((".json", ".jsonl")))
    return path if is_path or not path else None

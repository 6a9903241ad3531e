"""The chat in a terminal: line editing, history, completion, and answers rendered as Markdown."""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.keys import Keys
from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from deepseek_vl.serve.markdown import safe_markdown
from deepseek_vl.serve.terminal.attachments import EXTENSIONS
from deepseek_vl.serve.terminal.screen import ANSWER, without_first_space

_CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
_SEQUENCE = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]?|(?:\x1b[\\]P^_X]|[\x90\x98\x9d-\x9f])[^\x07\x1b]*(?:\x07|\x1b\\\\)?|\x1b.?",
    re.DOTALL,
)  # ECMA-48's control sequences and strings, of 7 or 8 bits: colours, titles, moves of the cursor
_FENCE = re.compile(r"^ {0,3}(```|~~~)", re.MULTILINE)
_BLOCK = re.compile(r"\s*(?:```|~~~|#|[-*+] |\d+[.)] |>|\||---| {4})")
_PATH_BEGIN = re.compile(r"(?:(?<=[\s'\"])|^)(?:(?:~|\.{1,2})?/|[A-Za-z]:[\\/])")


class TerminalScreen:
    """A terminal with line editing, history across runs, completion of paths, and answers rendered as Markdown.

    Args:
        history: the file that keeps what was typed.
    """

    def __init__(self, history: Path):
        self._console = _Console(highlight=False)
        options: dict[str, Any] = {"complete_while_typing": False, "enable_suspend": True, "key_bindings": _bindings()}
        self._messages: PromptSession[str] = PromptSession(
            history=_open_history(history), completer=MessageCompleter(), **options
        )
        self._paths: PromptSession[str] = PromptSession(completer=_Paths(file_filter=_may_be_image), **options)

    @property
    def columns(self) -> int:
        return self._console.width

    def read(self, prompt: str, default: str = "", path: bool = False) -> str:
        return without_control((self._paths if path else self._messages).prompt(prompt, default=default))

    def say(self, text: str) -> None:
        self._console.print(text.translate(_CONTROL), markup=False, emoji=False, soft_wrap=True)

    def answer(self, pieces: Generator[str]) -> None:
        # Finished paragraphs are printed once; the last one is redrawn with every piece.
        text, shown = "", 0
        with _without_echo(self._console):
            try:
                with contextlib.closing(pieces), Live(console=self._console, transient=True) as live:
                    for piece in without_first_space(pieces):
                        text += piece.translate(_CONTROL)
                        done, text = split_finished(text)
                        if done:
                            live.console.print(_markdown(done, is_first=not shown), end="\n\n")
                            shown += 1
                        live.update(_Tail(_markdown(text, is_first=not shown)))
            except BaseException:
                if text or shown:
                    self._console.print(_markdown(text, is_first=not shown))
                raise
            self._console.print(_markdown(text, is_first=not shown))


def without_control(text: str) -> str:
    """Typed or pasted text without control characters and sequences: `\\x1b[31mred` becomes `red`."""
    return _SEQUENCE.sub("", text).translate(_CONTROL)


def _bindings() -> KeyBindings:
    """Key bindings that ignore reports of the mouse.

    A pasted colour sequence looks like such a report, in which prompt_toolkit expects three numbers.
    """
    bindings = KeyBindings()
    bindings.add(Keys.Vt100MouseEvent)(lambda event: None)
    return bindings


@contextlib.contextmanager
def _without_echo(console: Console) -> Iterator[None]:
    """Turn off the terminal's echo, which would displace what is redrawn; the next prompt gets the keys."""
    try:
        import termios
    except ImportError:  # on Windows, where nothing is echoed outside a prompt
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = before.copy()
    silent[3] &= ~termios.ECHO

    def suspend(*_: object) -> None:  # Ctrl-Z: the shell gets the terminal as it was
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
        console.show_cursor(True)
        os.kill(os.getpid(), signal.SIGSTOP)
        termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
        console.show_cursor(False)

    handler = signal.signal(signal.SIGTSTP, suspend)
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
        signal.signal(signal.SIGTSTP, handler)


def split_finished(text: str) -> tuple[str, str]:
    """Split Markdown into the paragraphs that no further text can change, and the rest."""
    for match in reversed(list(re.finditer(r"\n\n(?=\S)", text))):
        if len(_FENCE.findall(text, 0, match.start())) % 2 == 0:
            return text[: match.start()], text[match.end() :]
    return "", text


def _markdown(text: str, is_first: bool) -> Markdown:
    """A part of an answer as Markdown; the first part has the label in front.

    Line breaks are kept, unlike in Markdown, because they matter in text that a model transcribes.
    """
    lines, fenced = [], False
    for line in safe_markdown(text).split("\n"):
        fenced ^= bool(_FENCE.match(line))
        lines.append(line if fenced or not line else f"{line}  ")
    if is_first:
        lines[0] = f"**{ANSWER.strip()}**" + ("\n\n" if _BLOCK.match(lines[0]) else " ") + lines[0]
    return Markdown("\n".join(lines))


class _Console(Console):
    """A console with its terminal's size. LINES and COLUMNS are not used: they may be a parent process's."""

    @property
    def size(self) -> ConsoleDimensions:
        columns, lines = os.get_terminal_size(sys.stdout.fileno())
        return ConsoleDimensions(columns or 80, lines or 25)  # some terminals do not say


class _Tail:
    """Markdown of which only the last lines, as many as the screen has room for, are drawn."""

    def __init__(self, content: Markdown):
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options.update(height=None), pad=False)
        for i, line in enumerate(lines[-max(1, console.height - 2) :]):
            if i:
                yield Segment.line()
            yield from line


class _Paths(Completer):
    """Completes paths. A directory's path ends with a slash, so that its contents can be completed next."""

    def __init__(self, file_filter: Callable[[str], bool] | None = None):
        self._paths = PathCompleter(file_filter=file_filter, expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        for completion in self._paths.get_completions(document, complete_event):
            slash = "/" if completion.display_text.endswith("/") else ""
            yield Completion(completion.text + slash, completion.start_position, completion.display)


class MessageCompleter(Completer):
    """Completes paths that stand in a message: of images, or of any file after `save` and `load`."""

    def __init__(self) -> None:
        self._images = _Paths(file_filter=_may_be_image)
        self._files = _Paths()

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        if match := re.match(r"(?:save|load)\s+", text, re.IGNORECASE):
            yield from self._files.get_completions(Document(text[match.end() :]), complete_event)
            return
        for match in _PATH_BEGIN.finditer(text):  # the longest that has completions: names may have spaces
            found = list(self._images.get_completions(Document(text[match.start() :]), complete_event))
            if found:
                yield from found
                return


def _may_be_image(name: str) -> bool:
    return Path(name).is_dir() or name.lower().endswith(tuple(f".{extension}" for extension in EXTENSIONS))


class _TextHistory(FileHistory):
    """History in a file. Typed bytes that are not valid text, which cannot be written, are replaced."""

    def store_string(self, string: str) -> None:
        super().store_string(without_control(string).encode("utf-8", "replace").decode("utf-8"))


def _open_history(path: Path) -> History:
    """History in a file, or in memory for this run if the file cannot be written."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("a"):
            path.chmod(0o600)  # it is the user's own
    except OSError:
        return InMemoryHistory()
    return _TextHistory(path)

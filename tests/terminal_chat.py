"""`cli_chat.py` in a terminal: what its user types and sees."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pyte
from conftest import ROOT, in_terminal

USER = "User:"
PATH = "Input the image file path:"


class Chat:
    """`cli_chat.py` in a terminal, and what the terminal shows."""

    def __init__(
        self,
        model_path: str | Path,
        *arguments: str,
        size: tuple[int, int] = (60, 200),
        patience: float = 60.0,
        **options: Any,
    ):
        self.patience = patience
        command = [str(ROOT / "cli_chat.py"), "--model_path", str(model_path), "--temperature", "0"]
        command += ["--max_gen_len", "2500", "--dtype", "float32", "--device", "cpu", *arguments]
        rows, self.columns = size
        self._state = tempfile.TemporaryDirectory()
        environment = {**os.environ, "XDG_STATE_HOME": self._state.name, "TERM": "xterm-256color", "LINES": "24"}
        options.setdefault("env", environment)  # LINES is wrong: a parent process may have set it for another terminal
        self.process = in_terminal(command, dimensions=size, **options)
        self._screen = pyte.HistoryScreen(self.columns, rows, history=1000)
        self._screen.write_process_input = self.process.send  # answers requests for the cursor's position
        self._stream = pyte.Stream(self._screen)
        self.wait_for_prompt()

    def read(self) -> list[str]:
        """The lines on the screen, without blank ones."""
        with contextlib.suppress(pexpect.TIMEOUT, pexpect.EOF):
            while received := self.process.read_nonblocking(65536, timeout=0.05):
                self._stream.feed(received)
        return [line.rstrip() for line in self._screen.display if line.strip()]

    def scrolled_away(self) -> list[str]:
        """The lines that have scrolled off the top of the screen."""
        rows = self._screen.history.top
        return ["".join(row[column].data for column in range(self._screen.columns)).rstrip() for row in rows]

    def wait(self, what: str, is_there: Callable[[list[str]], bool]) -> list[str]:
        """Wait until a condition holds for the screen's lines; returns them."""
        deadline = time.monotonic() + self.patience
        while not is_there(lines := self.read()):
            assert time.monotonic() < deadline, f"no {what} on the screen:\n" + "\n".join(lines)
        return lines

    def wait_for(self, text: str) -> None:
        self.wait(repr(text), lambda lines: text in "\n".join(lines))

    def wait_for_prompt(self, prompt: str = USER) -> list[str]:
        return self.wait(repr(prompt), lambda lines: bool(lines) and lines[-1].endswith(prompt))

    def press(self, keys: str) -> None:
        self.process.send(keys)

    def enter(self, text: str, prompt: str = USER) -> str:
        """Enter a line on a cleared screen; returns the output up to the next prompt."""
        self.press("\x0c")
        self.wait("clean screen", lambda lines: len(lines) == 1)
        self.press(f"{text}\r")
        lines = self.wait(f"{prompt!r} after {text!r}", lambda lines: len(lines) > 1 and lines[-1].endswith(prompt))
        return "\n".join(lines[1:-1])

    def fail(self, text: str) -> str:
        """Enter a line that is refused and offered again for editing; returns the error."""
        said = self.enter(text, f"{USER} {text}")
        self.press("\x03")
        self.wait_for_prompt()
        return said

    def ask(self, text: str) -> str:
        """Send a message; returns the answer."""
        return self.enter(text).partition("Assistant: ")[2]

    def close(self) -> None:
        self.process.close(force=True)
        self._state.cleanup()

"""The output of a run over many pictures, as JSON Lines. A later run goes on from this file alone."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from deepseek_vl.command_line import one_line
from deepseek_vl.serve.batch.inputs import key_of

FORMAT = "deepseek-vl captions 1"
OF_RELATIVE_PATHS = "folder"
"""A part of the question that counts only if both commands have it: the folder that their relative paths begin at."""


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # a path that is not UTF-8
        return (json.dumps(row) + "\n").encode("ascii")


_START = _line({"format": FORMAT})[:-2]

COLUMNS = ("path", "caption", "error", "prompt_tokens", "completion_tokens", "finish_reason")
"""The fields of a row. `caption` or `error` is None."""


class Journal:
    """A file of rows about pictures, each a line that is written at once; a context manager that closes the file.

    The file's first line holds the question, so that answers to different questions are not mixed. As long as the
    journal is open, no other process can open it.

    Args:
        path: of the file, which may have rows already.
        question: what is asked: the model, the prompt and so on; JSON.

    Attributes:
        rows: how many there are.
        errors: how many of them have an error.

    Raises:
        OSError: if it cannot be opened, or another process has it open.
        ValueError: if the file is no journal, or has answers to another question.
    """

    def __init__(self, path: str | os.PathLike, question: Mapping[str, Any]):
        self.path = Path(path)
        self.rows = self.errors = 0
        self._keys: set[str] = set()
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{str(path)!r} is no file that rows could be kept in.")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"There is no folder {str(self.path.parent)!r} for the output; make it first.")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            self._file = os.fdopen(descriptor, "r+b", buffering=0)
        except OSError as error:
            raise OSError(f"Cannot open {str(path)!r}: {error.strerror}.") from error
        try:
            _lock(self._file, self.path)
            self._continue({"format": FORMAT, **question})
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, key: str) -> bool:
        """Whether there is a row about the picture with this `PictureSource.key`."""
        return key in self._keys

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row.

        Raises:
            OSError: if it cannot be written. The rows before it are whole.
        """
        self._write(row)
        self._count(row)

    def _count(self, row: Mapping[str, Any]) -> None:
        self._keys.add(key_of(row["path"]))
        self.rows += 1
        self.errors += row["error"] is not None

    def _write(self, row: Mapping[str, Any]) -> None:
        line = _line(row)
        try:
            written = 0
            while written < len(line):  # the system may take a part of it
                written += self._file.write(line[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
                self._file.seek(self._end)
            raise OSError(
                f"Cannot write to {str(self.path)!r}: {error.strerror}. Its {self.rows} rows are whole; when there is "
                "room, the same command goes on with the others."
            ) from error
        self._end += len(line)

    def _continue(self, header: Mapping[str, Any]) -> None:
        """Read the rows in the file, and remove a last line that is incomplete; a new file gets the header."""
        self._end, differences = 0, ""
        with open(self.path, "rb") as file:  # noqa: PTH123
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    if number == 1 and not (line.startswith(_START) or _START.startswith(line)):
                        raise ValueError(_is_none(self.path, number))
                    break
                if number == 1:
                    differences = self._differences(line, header)
                else:
                    try:
                        self._count(json.loads(line))
                    except (ValueError, KeyError, TypeError) as error:
                        raise ValueError(_is_none(self.path, number)) from error
                self._end += len(line)
        if differences and self.rows:
            raise ValueError(
                f"{str(self.path)!r} has answers to another question: {differences}. Give another --output."
            )
        if differences:
            self._end = 0
        self._file.truncate(self._end)
        self._file.seek(self._end)
        if not self._end:
            self._write(header)

    def _differences(self, line: bytes, header: Mapping[str, Any]) -> str:
        """How the question in the file's first line differs from this run's."""
        try:
            earlier = json.loads(line)
            is_ours = earlier.get("format") == FORMAT
        except (ValueError, AttributeError):
            is_ours = False
        if not is_ours:
            raise ValueError(_is_none(self.path, 1))
        both = earlier.keys() & header.keys()
        counting = [name for name in dict.fromkeys([*earlier, *header]) if name in both or name != OF_RELATIVE_PATHS]
        names = [name for name in counting if earlier.get(name) != header.get(name)]
        return "; ".join(f"{name} was {earlier.get(name)!r}, not {header.get(name)!r}" for name in names)


def row_of(name: str, answer: Any) -> dict[str, Any]:
    """A row about the picture of this name: a `Caption`'s, or an exception's."""
    row: dict[str, Any] = {**dict.fromkeys(COLUMNS), "path": name}
    if isinstance(answer, Exception):
        return {**row, "error": one_line(answer)}
    fields = asdict(answer)
    return {**row, "caption": fields.pop("text"), **fields}


def read_rows(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """A journal's rows."""
    with open(path, "rb") as file:  # noqa: PTH123
        next(file)
        yield from map(json.loads, file)


def _is_none(path: Path, line: int) -> str:
    return f"Line {line} of {str(path)!r} is not what this command writes; give another --output."


def _lock(file: BinaryIO, path: Path) -> None:
    """Lock the file against other processes, until it is closed or this process ends."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(1 << 40)  # a byte that nobody reads
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(0)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise OSError(f"Another command is writing to {str(path)!r}.") from error

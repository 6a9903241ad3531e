"""Reading files of rows: JSON Lines or a list in JSON, either also compressed, and Parquet."""

import bz2
import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from deepseek_vl.data.errors import BadRow, DataError
from deepseek_vl.data.fields import kind

COMPRESSED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
"""The first bytes of compressed files that can be read -> the function that opens them."""

PARQUET = b"PAR1"

OTHERS = {
    b"PK\x03\x04": "a ZIP archive or an Excel sheet; unpack it, or export the sheet as JSON Lines",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard; decompress it: zstd -d FILE",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"ARROW1": "an Arrow file; save it as Parquet",
    b"SQLite format 3": "an SQLite database; export its rows as JSON Lines",
    b"\x89HDF": "an HDF5 file; export its rows as JSON Lines",
    b"\x93NUMPY": "a NumPy array; write its rows as JSON Lines",
    b"%PDF": "a PDF document, not rows",
    b"\x89PNG": "an image; a row names it",
    b"\xff\xd8\xff": "an image; a row names it",
    PARQUET: "compressed Parquet; decompress it",  # as it is, it can be read
    b"\x80": "a Python pickle; write its rows as JSON Lines",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}
"""The first bytes of files that cannot be read -> what the error says of them."""

AS_LINES = "write one row per line as JSON, and name the file .jsonl"


def data_files(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """The data files' paths, with `~` expanded.

    Raises:
        OSError: if one is missing or a directory.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    files = [Path(os.path.expanduser(path)) for path in paths]  # noqa: PTH111  Path's raises for unknown users
    for file in files:
        if file.is_dir():
            raise IsADirectoryError(f"{str(file)!r} is a directory; name the data files in it.")
        if not file.exists():
            raise FileNotFoundError(f"There is no data file {str(file)!r}.")
    return files


def decoded_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(origin, decoded row or BadRow) of each row of a file, in order; blank lines are passed over.

    Raises:
        DataError: for a file that does not hold rows in one of the forms.
        OSError: if it cannot be opened.
    """
    with path.open("rb") as file:
        start = next((start for start in COMPRESSED if file.peek(16).startswith(start)), None)
        try:
            content = COMPRESSED[start](file, "rb") if start else file
            beginning = content.peek(512)[:512]
            if beginning.startswith(PARQUET) and not start:
                yield from _parquet_rows(path)
                return
            _check_is_text(path, beginning)
            name = Path(path.stem) if start else path  # `rows.json` of `rows.json.gz`
            yield from (_json_rows if name.suffix.lower() == ".json" else _jsonl_rows)(path, content)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise DataError(f"{str(path)!r} is broken or cut off ({error}); compress it again.") from error


def _check_is_text(path: Path, beginning: bytes) -> None:
    """Check the first bytes of a file's content, decompressed.

    Raises:
        DataError: if they are no text's.
    """
    what = next((what for start, what in OTHERS.items() if beginning.startswith(start)), None)
    if beginning[257:262] == b"ustar":
        what = "a tar archive; unpack it"
    elif what is None and b"\0" in beginning:
        what = "binary, or UTF-16 text; save it as UTF-8, one row per line as JSON"
    if what is not None:
        raise DataError(f"{str(path)!r} is {what}.")


def _jsonl_rows(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """(origin, decoded row or BadRow) of each line. Lines end at newlines only: JSON text may hold other breaks."""
    is_first = True
    for number, line in enumerate(file, 1):
        origin = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield origin, BadRow(origin, f"not UTF-8 text (byte {error.start + 1} of the line); save the file as UTF-8")
            continue
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            if is_first and file.seekable():
                rest = file.read()
                _check_is_lines(path, text + rest.decode("utf-8", errors="replace"))
                file.seek(-len(rest), os.SEEK_CUR)
            row = BadRow(origin, f"not JSON ({_json_problem(error)}); each line must be one whole row")
        yield origin, row
        is_first = False


def _check_is_lines(path: Path, text: str) -> None:
    """Raise an error if a file's text is recognised as something else than JSON Lines.

    Raises:
        DataError: if it is a table, XML, HTML, YAML, or JSON that goes over several lines.
    """
    text = text.strip()
    if text[0] in "[{":
        try:
            _, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return
        if "\n" in text[:end]:
            is_list = text[0] == "["
            advice = "name the file .json" if is_list and end == len(text) else "give each row one line of its own"
            what = "one list" if is_list else "a row"
            raise DataError(f"{str(path)!r} has {what} over several lines, as printed for people; {advice}.")
        return
    if form := "CSV" if path.suffix.lower() == ".csv" else _form_of(text):
        raise DataError(f"{str(path)!r} is {form}, not JSON Lines; {AS_LINES}.")


def _form_of(text: str) -> str | None:
    """What a text that is no JSON is, by its first lines; None if it cannot be told."""
    for start, name in (("<", "XML or HTML"), ("---", "YAML"), ("- ", "YAML")):
        if text.startswith(start):
            return name
    for delimiter, name in ((",", "CSV"), (";", "CSV"), ("\t", "a table with tabs"), ("|", "a table")):
        records = csv.reader(io.StringIO(text), delimiter=delimiter)
        with contextlib.suppress(csv.Error):
            columns, *others = map(len, itertools.islice(records, 5))
            if columns > 1 and columns in others:
                return name
    return None


def _json_rows(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """(origin, decoded row) of each item of a list."""
    data = file.read()
    if not data.strip():
        return
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{str(path)!r} is not UTF-8 text (line {line}); save it as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        _check_is_lines(path, data.decode("utf-8-sig"))
        advice = "name a file with one row per line .jsonl"
        raise DataError(f"{str(path)!r} is not JSON ({_json_problem(error)}); {advice}.") from error
    if not isinstance(rows, list):
        advice = "name a file with one row per line .jsonl, and put a single row into brackets: [...]"
        raise DataError(f"{str(path)!r} is {kind(rows)}, not a list of rows; {advice}.")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(origin, row) of each row of a Parquet file."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{str(path)!r} is Parquet, which pyarrow reads: pip install pyarrow.") from error
    try:
        number = 0
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):  # few, because rows may hold pictures
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{str(path)!r} is Parquet that cannot be read: {' '.join(str(error).split())}") from error


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"{error.msg} at {line}column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)

"""A journal of captions in other forms: CSV, Parquet, or a text file beside each picture."""

import csv
import itertools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_vl.command_line import one_line
from deepseek_vl.data.files import whole_file
from deepseek_vl.serve.batch.inputs import PictureSource, key_of, parquet_modules
from deepseek_vl.serve.batch.journal import COLUMNS, read_rows

logger = logging.getLogger(__name__)

ROWS_AT_A_TIME = 10_000


def check_export(path: Path, others: Iterable[str]) -> None:
    """Check, before there is a table, that it can be written to `path`.

    Args:
        others: absolute paths of files that it must not replace.

    Raises:
        OSError, ValueError: if it cannot.
    """
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise ValueError(f"--export writes .csv or .parquet files, not {str(path)!r}.")
    if path.suffix.lower() == ".parquet":
        parquet_modules()
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(path.parent)!r} for --export; make it first.")
    if os.path.abspath(path) in others:  # noqa: PTH100
        raise ValueError(f"--export {str(path)!r} would replace an input or the output.")
    if path.exists() and _columns(path) != list(COLUMNS):
        raise FileExistsError(f"--export {str(path)!r} exists, and is no table of captions; choose another name.")


def _columns(path: Path) -> list[str] | None:
    """The names of a table's columns; None if it cannot be read."""
    try:
        if path.suffix.lower() == ".csv":
            with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                return next(csv.reader(file), [])
        _, parquet = parquet_modules()
        return parquet.read_schema(path).names
    except (OSError, ValueError, csv.Error):  # pyarrow's errors are ValueErrors
        return None


def export(journal: str | os.PathLike, path: Path) -> None:
    """Write a journal's rows as a table; its file appears, or is replaced, when it is complete.

    Raises:
        OSError: if it cannot be written.
    """
    with whole_file(path) as part:
        (_write_csv if path.suffix.lower() == ".csv" else _write_parquet)(read_rows(journal), part)


def _write_csv(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    # surrogateescape: paths that are not UTF-8 are written as the bytes that they are.
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    pyarrow, parquet = parquet_modules()
    types = {name: pyarrow.int64() if name.endswith("_tokens") else pyarrow.string() for name in COLUMNS}
    schema = pyarrow.schema(types.items())
    with parquet.ParquetWriter(path, schema) as writer:
        rows = iter(rows)
        while batch := list(itertools.islice(rows, ROWS_AT_A_TIME)):
            texts = [{name: _as_utf8(row.get(name)) for name in COLUMNS} for row in batch]
            writer.write_table(pyarrow.Table.from_pylist(texts, schema))


def _as_utf8(value: Any) -> Any:
    """Text in which bytes that are not UTF-8 are escaped; other values as they are."""
    return os.fsencode(value).decode("utf-8", "backslashreplace") if isinstance(value, str) else value


def check_sidecars(pictures: Sequence[PictureSource]) -> None:
    """Check that each picture has a place for a text file of its own beside it.

    Raises:
        ValueError: if one has not.
    """
    owners: dict[str, str] = {}
    for picture in pictures:
        if not picture.is_file:
            raise ValueError(f"--sidecar writes beside picture files, and {picture.name!r} is none; use --export.")
        text = _sidecar(picture.name)
        if text in owners:
            raise ValueError(f"--sidecar: {owners[text]!r} and {picture.name!r} would share {text!r}; use --export.")
        owners[text] = picture.name


def write_sidecars(journal: str | os.PathLike, pictures: Iterable[PictureSource]) -> None:
    """Write each caption of these pictures to a `.txt` file beside it. A file with another text is left as it is.

    Raises:
        OSError: if some cannot be written, after all others.
    """
    files = {picture.key: _sidecar(picture.file) for picture in pictures}
    left, failed = [], []
    for row in read_rows(journal):
        path = files.get(key_of(row["path"]))
        if path is None or row["caption"] is None:
            continue
        text = row["caption"].encode("utf-8", "replace")
        try:
            if not os.path.lexists(path):
                with whole_file(path) as part:
                    part.write_bytes(text)
            elif Path(path).read_bytes() != text:
                left.append(path)
        except OSError as error:
            failed.append(one_line(error))
    if left:
        logger.warning("%d text files have another text, and are left as they are; one is %r.", len(left), left[0])
    if failed:
        raise OSError(f"{len(failed)} text files cannot be written. {failed[0]}")


def _sidecar(picture: str) -> str:
    return os.path.splitext(picture)[0] + ".txt"  # noqa: PTH122

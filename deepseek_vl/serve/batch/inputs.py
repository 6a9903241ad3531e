"""The pictures that a command line names: files, folders, globs, lists of paths, tar shards, Parquet."""

import codecs
import functools
import glob
import io
import logging
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from deepseek_vl.imaging.open import ImageLoadError, load_image

logger = logging.getLogger(__name__)

PICTURES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""The endings of pictures' names in folders and shards."""

OTHER_PICTURES = (".dib", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".pbm", ".pgm", ".pnm", ".tga")
"""Further endings of files that are asked about where they are named."""


@dataclass(frozen=True)
class PictureSource:
    """The place of a picture: a file, or a part of one.

    Attributes:
        name: what the output calls it: its path as given, `shard.tar/000123.jpg` or `data.parquet#17`.
        file: absolute path of the file that has it.
        place: in a tar shard, where its bytes begin and how many they are.
        row: in a Parquet file, the row group, the row within it, and the column.
        error: why the picture cannot be opened, if that is known already.
    """

    name: str
    file: str
    place: tuple[int, int] | None = None
    row: tuple[int, int, str] | None = None
    error: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether it is a file of its own."""
        return self.place is None and self.row is None

    @property
    def key(self) -> str:
        """Identifies the picture: two names of the same picture have the same key."""
        return key_of(self.name)


def key_of(name: str) -> str:
    """The `PictureSource.key` that belongs to a name in the output."""
    return os.path.abspath(name)  # noqa: PTH100  a tar member's is no path


def open_picture(source: PictureSource) -> Image.Image:
    """Open one picture, in RGB.

    Raises:
        ImageLoadError: naming it and the cause.
    """
    if source.error is not None:
        raise ImageLoadError(f"Cannot read {source.name!r}: {source.error}.")
    if source.is_file:
        if os.path.exists(source.file) and not os.path.isfile(source.file):  # noqa: PTH110, PTH113
            raise ImageLoadError(f"Cannot read image {source.name!r}: no regular file.")  # a pipe would wait for ever
        return load_image(source.file)
    try:
        where: Any = source.place or source.row
        data = _member(source.file, *where) if source.place else _cell(source.file, *where)
    except (OSError, ValueError) as error:
        raise ImageLoadError(f"Cannot read image {source.name!r}: {error}.") from error
    if isinstance(data, str):
        return load_image(os.path.join(os.path.dirname(source.file), data))  # noqa: PTH118, PTH120
    file = io.BytesIO(data)
    file.name = source.name  # for error messages
    return load_image(file)


def find_pictures(paths: Sequence[str], image_column: str | None = None) -> list[PictureSource]:
    """All pictures that the paths name, each once, in order.

    Args:
        paths: pictures; folders, whose pictures are found by their names' endings, at any depth; globs; `.txt` files of
            paths; `.tar` shards; `.parquet` files. A `.txt` file beside a picture of the same name is its caption, and
            left out.
        image_column: the pictures' in Parquet files; None for `image`, or else the only one that may have pictures.

    Raises:
        OSError: if there is nothing under a path.
        ValueError: if there are no pictures at all, or Parquet cannot be read.
    """
    found: dict[str, PictureSource] = {}
    captions, names = 0, functools.cache(_names)
    for path in paths:
        matches = _matches(path)
        wanted = [match for match in matches if not _is_caption(match, names)]  # a glob names these too
        captions += len(matches) - len(wanted)
        count = 0
        for match in wanted:
            for source in _of_path(match, image_column):
                count += 1
                found.setdefault(source.key, source)
        if wanted and not count:
            logger.warning("There are no pictures in %r.", path)
    if captions:
        logger.info("%d text files are captions of pictures beside them, and left out.", captions)
    if not found:
        named = ", ".join(map(repr, paths[:3])) + (" ..." if len(paths) > 3 else "")
        raise ValueError(
            f"There are no pictures in {named}. Folders are searched for files with a picture's ending; tar and "
            "Parquet files have to be named, or matched by a glob."
        )
    return list(found.values())


def _matches(path: str) -> list[str]:
    """What a path, which may be a glob, stands for.

    Raises:
        FileNotFoundError: if that is nothing.
    """
    path = os.path.expanduser(path)  # noqa: PTH111  Path's raises for unknown users
    if os.path.lexists(path):
        return [os.path.normpath(path)]
    if not glob.has_magic(path):
        raise FileNotFoundError(f"There is no {path!r}.")
    matches = sorted(glob.glob(path, recursive=True))  # noqa: PTH207  Path's knows no absolute patterns
    if not matches:
        raise FileNotFoundError(f"Nothing matches {path!r}.")
    return list(map(os.path.normpath, matches))


def _is_caption(path: str, names: Callable[[str], frozenset[str]]) -> bool:
    """Whether it is the text file of a picture beside it, as `--sidecar` writes them.

    Args:
        names: `_names`, which may remember.
    """
    directory, name = os.path.split(path)
    stem, ending = os.path.splitext(name)  # noqa: PTH122
    if ending != ".txt":
        return False
    return any(f"{stem}{other}" in names(directory) for other in (*PICTURES, *OTHER_PICTURES))


def _names(directory: str) -> frozenset[str]:
    """The names in a folder, their endings in lower case; none if it cannot be read."""
    try:
        names = os.listdir(directory or ".")  # noqa: PTH208
    except OSError:
        return frozenset()
    parts = map(os.path.splitext, names)
    return frozenset(stem + ending.lower() for stem, ending in parts)


def _of_path(path: str, image_column: str | None) -> Iterator[PictureSource]:
    ending = Path(path).suffix.lower()
    if os.path.isdir(path):  # noqa: PTH112
        yield from _of_folder(path)
    elif ending == ".txt":
        yield from _of_list(path, image_column)
    elif ending == ".tar":
        yield from _of_shard(path)
    elif ending == ".parquet":
        yield from _of_parquet(path, image_column)
    else:
        yield _of_file(path)


def _of_file(path: str, error: str | None = None) -> PictureSource:
    return PictureSource(path, os.path.abspath(path), error=error)  # noqa: PTH100


def _of_folder(folder: str) -> Iterator[PictureSource]:
    """A folder's pictures at any depth, following links; names that begin with a dot are left out."""
    seen = set()  # links may lead round in circles
    for directory, folders, files in os.walk(folder, followlinks=True, onerror=_warn):
        status = os.stat(directory)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(PICTURES) and not name.startswith("."):
                yield _of_file(os.path.join(directory, name))  # noqa: PTH118


def _warn(error: OSError) -> None:
    logger.warning("The folder %r cannot be read, and is left out: %s.", error.filename, error.strerror)


def _of_list(path: str, image_column: str | None) -> Iterator[PictureSource]:
    """The pictures in a list of paths (lines, or ended by NULs), relative to its folder or else to the current one."""
    data = Path(path).read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as PowerShell writes lists
        data = os.fsencode(data.decode("utf-16", "replace"))
    data = data.removeprefix(codecs.BOM_UTF8)
    parts = data.split(b"\0")
    if len(parts) > 4 and 2 * sum(len(part) < 2 for part in parts) > len(parts):
        raise ValueError(f"The list {path!r} is UTF-16 text; save it as UTF-8.")
    for line in parts if len(parts) > 1 else data.splitlines():
        if not line.strip():
            continue
        name = os.fsdecode(line)
        beside = os.path.join(os.path.dirname(path), name)  # noqa: PTH118, PTH120
        wanted = os.path.normpath(beside if os.path.lexists(beside) else name)
        if not os.path.lexists(wanted):
            yield _of_file(wanted, "there is no such file")
        elif wanted.lower().endswith(".txt"):
            yield _of_file(wanted, "a list in a list")
        else:
            yield from _of_path(wanted, image_column)


def _of_shard(path: str) -> Iterator[PictureSource]:
    """The pictures in a tar file that is not compressed. Other members, such as texts, are skipped."""
    file = os.path.abspath(path)  # noqa: PTH100
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.isreg() and member.name.lower().endswith(PICTURES):
                    yield PictureSource(f"{path}/{member.name}", file, place=(member.offset_data, member.size))
    except (OSError, tarfile.TarError) as error:
        yield _of_file(path, f"the rest of it is no tar file: {error}")


def _member(file: str, offset: int, size: int) -> bytes:
    with open(file, "rb") as shard:  # noqa: PTH123
        shard.seek(offset)
        data = shard.read(size)
    if len(data) < size:
        raise ValueError("the shard ends in the middle of it")
    return data


def _of_parquet(path: str, image_column: str | None) -> Iterator[PictureSource]:
    pyarrow, parquet = parquet_modules()
    file, number = os.path.abspath(path), 0  # noqa: PTH100
    try:
        with parquet.ParquetFile(path) as table:
            column = _image_column(path, table.schema_arrow, image_column)
            for group in range(table.num_row_groups):
                for row in range(table.metadata.row_group(group).num_rows):
                    yield PictureSource(f"{path}#{number}", file, row=(group, row, column))
                    number += 1
    except (OSError, pyarrow.ArrowInvalid) as error:
        yield _of_file(path, f"it is no Parquet file: {error}")


def parquet_modules() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("Parquet needs the package pyarrow: pip install '.[caption]'.") from error
    return pyarrow, parquet


def _image_column(path: str, schema: Any, wanted: str | None) -> str:
    """The column that has pictures: bytes, structs with `bytes` and `path` as datasets' `Image` writes, or paths.

    Raises:
        ValueError: if the wanted one is missing, or several or none may have pictures.
    """
    if wanted is not None:
        if wanted not in schema.names:
            raise ValueError(f"{path!r} has no column {wanted!r}; it has {', '.join(map(repr, schema.names))}.")
        return wanted
    kinds = {field.name: str(field.type) for field in schema}
    columns = [name for name, kind in kinds.items() if kind.endswith("binary") or kind.startswith("struct<bytes")]
    if "image" in kinds:
        return "image"
    if len(columns) != 1:
        raise ValueError(f"{path!r} has {len(columns)} columns that may have pictures; name one by --image_column.")
    return columns[0]


def _cell(file: str, group: int, row: int, column: str) -> bytes | str:
    """A picture's content, or its path.

    Raises:
        OSError, ValueError: if there is none.
    """
    value = _group(file, group, column)[row].as_py()
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not value or not isinstance(value, bytes | str):
        raise ValueError("the row has no picture")
    return value


@functools.lru_cache(maxsize=2)  # rows are read in order, by several threads
def _group(file: str, group: int, column: str) -> Any:
    _, parquet = parquet_modules()
    with parquet.ParquetFile(file) as table:
        return table.read_row_group(group, columns=[column]).column(0)

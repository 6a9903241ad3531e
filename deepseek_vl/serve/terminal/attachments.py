"""The images that belong to a typed message: files and addresses named in it, and opening them."""

import contextlib
import os
import re
import string
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import httpx
from PIL import Image

from deepseek_vl.engine.limits import TERMINAL_LIMITS
from deepseek_vl.imaging.open import ImageLoadError, load_image
from deepseek_vl.imaging.worker import PictureDecoder

EXTENSIONS = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif")
"""Endings of the names of files that are taken for images in a message."""

LONGEST_PATH = 4096
MOST_WORDS = 32
"""The most words of a path."""

SILENT_SECONDS = TERMINAL_LIMITS.fetch_seconds / 3
"""How many seconds a download may go without receiving anything."""

_NAME_END = re.compile(rf"\.(?:{'|'.join(EXTENSIONS)})(?=$|[\s'\"`,;:.!?)\]}}>])", re.IGNORECASE)
_URL = re.compile(r"https?://[^\s'\"<>`]+", re.IGNORECASE)
_QUOTES = "'\"`"
_BEFORE = f"{string.whitespace}{_QUOTES}(<,;"
_AROUND = f"{_BEFORE}.:!?)>"
_SEPARATORS = f"{string.whitespace},;"
_LOOKS_LIKE_A_PATH = re.compile(r"(?:~|\.{1,2})?/|file://|[A-Za-z]:[\\/]|[^\s/<>]+/")


def open_image(source: str) -> Image.Image:
    """Open an image for a message, from a path, an http or https address, or standard input (`-`).

    Raises:
        ImageLoadError: naming the source and the cause.
    """
    if source == "-":
        try:
            return _decoded(sys.stdin.buffer.read())
        except ImageLoadError as error:
            raise ImageLoadError(f"Standard input is no image: {_cause(error)}") from error
    if not _URL.fullmatch(source):
        return load_image(source)
    try:
        return _decoded(_download(source))
    except httpx.TimeoutException as error:
        raise ImageLoadError(f"Cannot fetch {source}: no answer within {SILENT_SECONDS:g} seconds.") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageLoadError(f"Cannot fetch {source}: {error}.") from error
    except ImageLoadError as error:
        raise ImageLoadError(f"What {source} gives is no image: {_cause(error)}") from error


def _decoded(data: bytes) -> Image.Image:
    """Decode a picture that is not trusted."""
    with contextlib.closing(PictureDecoder(TERMINAL_LIMITS.pictures)) as decoder:
        return decoder.decode(data)


def _download(url: str) -> bytes:
    body, deadline = bytearray(), time.monotonic() + TERMINAL_LIMITS.fetch_seconds
    with httpx.stream("GET", url, follow_redirects=True, timeout=SILENT_SECONDS) as response:
        if response.status_code != 200:
            raise httpx.HTTPError(f"it answers with status {response.status_code}")
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > TERMINAL_LIMITS.fetch_bytes:
                raise httpx.HTTPError(f"it is larger than {TERMINAL_LIMITS.fetch_bytes} bytes")
            if time.monotonic() > deadline:
                raise httpx.HTTPError("it takes too long")
    return bytes(body)


def _cause(error: ImageLoadError) -> str:
    return str(error).partition(": ")[2] or str(error)


def take_images(text: str, tag: str) -> tuple[str, list[str]]:
    """Recognise the images that a message names: addresses, and paths as they are typed, quoted, pasted or dropped.

    If all of them stand at the message's beginning and end, with nothing but commas between them, they belong to it as
    a whole. Otherwise an image tag replaces each. If the text has tags of its own, all images are for those.

    Returns:
        The text without the images' names, and the sources for `open_image`, in the order in which they are named.

    Raises:
        ImageLoadError: if what can only be the path of an image is no file.
    """
    if not (spans := list(_spans(text))):
        return text, []
    begins, ends, sources = zip(*spans, strict=True)
    between = [text[end:begin] for end, begin in zip((0, *ends), (*begins, len(text)), strict=True)]
    said = [part.strip(_SEPARATORS) for part in between]
    if tag in text or sum(map(bool, said)) <= 1:
        return " ".join(filter(None, said)), list(sources)
    return tag.join(between).strip(), list(sources)


def _spans(text: str) -> Iterator[tuple[int, int, str]]:
    """(begin, end, source) of each image named in a text, from left to right."""
    position = 0
    for match in _URL.finditer(text):
        url = match[0].rstrip(".,;:!?)]}")
        if _names_an_image(url):
            yield from _file_spans(text, position, match.start())
            position = match.start() + len(url)
            yield match.start(), position, url
    yield from _file_spans(text, position, len(text))


def _names_an_image(url: str) -> bool:
    try:
        return bool(_NAME_END.search(unquote(urlsplit(url).path)))
    except ValueError:  # "http://[your-host]/a.png"
        return False


def _file_spans(text: str, position: int, limit: int) -> Iterator[tuple[int, int, str]]:
    """(begin, end, source) of each image file named in `text[position:limit]`, from left to right."""
    for match in _NAME_END.finditer(text, position, limit):
        if span := _file_span(text, position, match.end()):
            yield span
            position = span[1]


def _file_span(text: str, position: int, end: int) -> tuple[int, int, str] | None:
    """(begin, end, path) of the longest part of `text[position:end]` that ends at `end` and names a file, or None."""
    nearby = range(max(position, end - LONGEST_PATH), end)
    begins = [begin for begin in nearby if begin == position or text[begin - 1] in _BEFORE]
    for begin in begins[-MOST_WORDS:]:
        raw = text[begin:end]
        quoted = begin > position and text[begin - 1] in _QUOTES and text[end : end + 1] == text[begin - 1]
        if path := _as_file(raw):
            return (begin - 1, end + 1, path) if quoted else (begin, end, path)
        is_path = quoted or (_LOOKS_LIKE_A_PATH.match(raw) and not re.search(r"(?<!\\)\s", raw))
        # Inside the text, what looks like a path may be plain text.
        at_an_end = not text[:begin].strip(_AROUND) or not text[end:].strip(_AROUND)
        if is_path and at_an_end:
            raise ImageLoadError(f"Cannot read image {raw!r}: there is no such file.")
        if quoted:  # the end of a quoted name is no name
            return None
    return None


def _as_file(raw: str) -> str | None:
    """The file that a piece of text names: as it is, as a `file://` address, or with a shell's backslashes."""
    if raw.startswith("file://"):
        return _existing(url2pathname(raw.removeprefix("file://").removeprefix("localhost")))
    return _existing(raw) or _existing(re.sub(r"\\(.)", r"\1", raw))


def _existing(path: str) -> str | None:
    expanded = os.path.expanduser(path)  # noqa: PTH111  Path's raises for unknown users
    try:
        return expanded if path.strip() == path and Path(expanded).is_file() else None
    except (OSError, ValueError):  # too long, or a null character
        return None

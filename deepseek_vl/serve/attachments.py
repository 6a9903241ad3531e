"""The images that belong to a typed message: files and addresses named in it, and opening them."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import httpx
from PIL import Image

from deepseek_vl.utils.io import ImageLoadError, load_image

EXTENSIONS = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif")
"""What a file's name ends with if it is taken for an image where it stands in a message."""

LONGEST_PATH = 4096
MAX_BYTES = 50 * 2**20
TIMEOUT_SECONDS = 20.0

_NAME_END = re.compile(rf"\.(?:{'|'.join(EXTENSIONS)})(?=$|[\s'\"`,;:.!?)\]}}>])", re.IGNORECASE)
_URL = re.compile(r"https?://[^\s'\"<>`]+", re.IGNORECASE)
_LOOKS_LIKE_A_PATH = re.compile(r"(?:~|\.{1,2})?/|file://|[A-Za-z]:[\\/]")


def open_image(source: str) -> Image.Image:
    """An image for a message: from a path, from an http or https address, or from standard input (`-`).

    Raises:
        ImageLoadError: naming the source and the cause.
    """
    if source == "-":
        try:
            return load_image(sys.stdin.buffer.read())
        except ImageLoadError as error:
            raise ImageLoadError(f"Standard input is no image: {_cause(error)}") from error
    if not _URL.fullmatch(source):
        return load_image(source)
    try:
        return load_image(_download(source))
    except httpx.TimeoutException as error:
        raise ImageLoadError(f"Cannot fetch {source}: no answer within {TIMEOUT_SECONDS:g} seconds.") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageLoadError(f"Cannot fetch {source}: {error}.") from error
    except ImageLoadError as error:
        raise ImageLoadError(f"What {source} gives is no image: {_cause(error)}") from error


def _download(url: str) -> bytes:
    body = bytearray()
    with httpx.stream("GET", url, follow_redirects=True, timeout=TIMEOUT_SECONDS) as response:
        if response.status_code != 200:
            raise httpx.HTTPError(f"it answers with status {response.status_code}")
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > MAX_BYTES:
                raise httpx.HTTPError(f"it is larger than {MAX_BYTES} bytes")
    return bytes(body)


def _cause(error: ImageLoadError) -> str:
    return str(error).partition(": ")[2] or str(error)


def take_images(text: str, tag: str) -> tuple[str, list[str]]:
    """Recognise the images that a message names: addresses, and paths as they are typed, quoted, pasted or dropped.

    Those at the message's ends go with it as a whole; one amid the text is replaced by an image tag there. Where the
    text has tags of its own, the images are for those.

    Returns:
        The text without them, and the sources for `open_image` in the order of their tags, those without a tag first.

    Raises:
        ImageLoadError: if what can only be the path of an image is no file.
    """
    if not (spans := list(_spans(text))):
        return text, []
    between = [
        text[end:begin]
        for end, begin in zip([0, *(e for _, e, _ in spans)], [*(b for b, *_ in spans), len(text)], strict=True)
    ]
    with_it: list[str] = []
    amid: list[str] = []
    result = between[0]
    for i, (_, _, source) in enumerate(spans):
        at_an_end = not "".join(between[: i + 1]).strip() or not "".join(between[i + 1 :]).strip()
        if tag in text or at_an_end:
            with_it.append(source)
            result = f"{result.rstrip()} {between[i + 1].lstrip()}"
        else:
            amid.append(source)
            result += tag + between[i + 1]
    return result.strip(), with_it + amid


def _spans(text: str) -> Iterator[tuple[int, int, str]]:
    """(begin, end, source) of each image named in a text, from left to right."""
    position = 0
    for match in _URL.finditer(text):
        url = match[0].rstrip(".,;:!?)]}")
        if _NAME_END.search(unquote(urlsplit(url).path)):
            yield from _file_spans(text, position, match.start())
            position = match.start() + len(url)
            yield match.start(), position, url
    yield from _file_spans(text, position, len(text))


def _file_spans(text: str, position: int, limit: int) -> Iterator[tuple[int, int, str]]:
    """The same for the files named in `text[position:limit]`."""
    for match in _NAME_END.finditer(text, position, limit):
        if span := _file_span(text, position, match.end()):
            yield span
            position = span[1]


def _file_span(text: str, position: int, end: int) -> tuple[int, int, str] | None:
    """The longest piece of `text[position:end]` that ends there and is the path of a file, in any way of writing it."""
    missing = None
    for begin in range(max(position, end - LONGEST_PATH), end):
        before = text[begin - 1 : begin] if begin > position else " "
        if not before.isspace() and before not in "'\"`(<":
            continue
        raw = text[begin:end]
        quoted = before in "'\"`" and text[end : end + 1] == before
        if path := _as_file(raw):
            return (begin - 1, end + 1, path) if quoted else (begin, end, path)
        whole = quoted or not re.search(r"(?<!\\)\s", raw)
        if missing is None and whole and _LOOKS_LIKE_A_PATH.match(raw):
            missing = raw
    if missing is not None:
        raise ImageLoadError(f"Cannot read image {missing!r}: there is no such file.")
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

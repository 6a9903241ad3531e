"""Pictures from files, bytes and data URLs: the one place that opens them."""

import base64
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image, ImageOps

MOST_ESCAPES = 1_000_000
"""How many percent-encoded bytes a data URL may have, as decoding them is slow."""


class ImageLoadError(OSError, ValueError):
    """An image cannot be read. It is an `OSError`, like Pillow's own errors, and a `ValueError`, as for bad input."""


class ImageTooLargeError(ImageLoadError):
    """An image has more pixels than may be decoded, or is too long or too narrow."""


@dataclass(frozen=True)
class PictureLimits:
    """Limits on pictures from untrusted clients. All but `seconds` and `memory_bytes` are checked in a file's header.

    Attributes:
        formats: kinds of files, by Pillow's names.
        pixels: width times height.
        side: the longer side in pixels.
        aspect: the longer side divided by the shorter.
        seconds: time for decoding a picture, see `deepseek_vl.imaging.worker`.
        memory_bytes: address space of the process that decodes it.
    """

    formats: tuple[str, ...]
    pixels: int
    side: int
    aspect: int
    seconds: float
    memory_bytes: int


def load_image(source: Any, limits: PictureLimits | None = None) -> Image.Image:
    """Open an image in RGB. All sources but PIL images are turned upright by their EXIF orientation.

    Only the first of several frames is read. Pictures of more than 8 bits per channel are scaled to 8.

    Args:
        source: a path (`str` or `Path`, `~` is expanded), a `data:` URL, bytes, a binary file object, or a PIL image.
        limits: for untrusted pictures; None for all formats and at most `PIL.Image.MAX_IMAGE_PIXELS` pixels.

    Raises:
        ImageLoadError: if the image is missing, broken, truncated, or not an image; it names the source and the cause.
        ImageTooLargeError: for an image beyond the limits.
    """
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        name, file = _shortened(filename) if filename else "given as a PIL image", None
    else:
        name, file = _open_source(source)
    try:
        # Pillow's decoders raise many types on broken files (OSError, SyntaxError, struct.error, ...).
        if file is None:
            _check_size(name, source.size, limits)
            source.load()
            return to_rgb(source)
        with Image.open(file, formats=None if limits is None else limits.formats) as image:
            _check_size(name, image.size, limits)
            return to_rgb(ImageOps.exif_transpose(image))
    except ImageLoadError:
        raise
    except FileNotFoundError as error:
        raise ImageLoadError(f"Cannot read image {name}: there is no such file.") from error
    except Image.UnidentifiedImageError as error:
        raise ImageLoadError(f"Cannot read image {name}: not an image file, or of an unknown kind.") from error
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"Refused image {name}: {error}") from error
    except MemoryError as error:
        raise ImageTooLargeError(f"Refused image {name}: there is too little memory to decode it.") from error
    except OSError as error:
        raise ImageLoadError(f"Cannot read image {name}: {error.strerror or error}.") from error
    except Exception as error:
        raise ImageLoadError(f"Cannot read image {name}: broken file ({error}).") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB. Values of more than 8 bits are scaled, where Pillow alone would clip them at 255."""
    if image.mode.startswith("I") or image.mode == "F":
        is_16_bit = image.mode.startswith("I;16")
        image = image.convert("F")
        highest: Any = image.getextrema()[1]
        if is_16_bit:
            scale = 1 / 256
        elif highest > 65535:
            scale = 255 / highest
        elif highest > 255:
            scale = 1 / 256
        else:  # values up to 1 are fractions
            scale = 255.0 if 0 < highest <= 1 else 1.0
        image = image.point(lambda value: value * scale).convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def _open_source(source: Any) -> tuple[str, Any]:
    """A name for error messages, which does not repeat the content, and the argument for `Image.open`."""
    if isinstance(source, str) and source[:5].lower() == "data:":
        return "in the data URL", io.BytesIO(data_url_bytes(source))
    if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
        raise ImageLoadError(
            f"Cannot read image {_shortened(source)}: URLs are not fetched; download it and give its path."
        )
    if isinstance(source, (str, Path)):
        return _shortened(str(source)), os.path.expanduser(source)  # noqa: PTH111  Path's raises for unknown users
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "in the given bytes", io.BytesIO(source)
    if hasattr(source, "read"):
        return _shortened(str(getattr(source, "name", type(source).__name__))), source
    raise ImageLoadError(f"Cannot read an image from {type(source).__name__}; give a path, bytes, file or PIL image.")


def _shortened(name: str) -> str:
    """A name in quotes, without its middle if it is long, as it may be a picture's content that was given as a path."""
    return repr(name if len(name) <= 300 else f"{name[:60]}...{name[-30:]}")


def data_url_bytes(url: str) -> bytes:
    """The content of a `data:` URL, decoded as in browsers: percent-encoded or base64, with any media type.

    Raises:
        ImageLoadError: if it has no comma, claims to be base64 and is not, or is percent-encoded and large.
    """
    header, comma, payload = url.partition(",")
    if not comma:
        raise ImageLoadError("Cannot read image in the data URL: it has no comma between its type and its content.")
    if payload.count("%") > MOST_ESCAPES:
        raise ImageLoadError(
            f"Cannot read image in the data URL: it has more than {MOST_ESCAPES} %; write it in base64."
        )
    content = unquote_to_bytes(payload.partition("#")[0])
    if header.replace(" ", "").lower().endswith(";base64"):
        content = b"".join(content.split())
        try:
            content = base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
        except ValueError as error:
            raise ImageLoadError(f"Cannot read image in the data URL: not base64 ({error}).") from error
    return content


def _check_size(name: str, size: tuple[int, int], limits: PictureLimits | None) -> None:
    """Refuse an image that is too large, by the size in its header."""
    (shorter, longer), pixels = sorted(size), size[0] * size[1]
    what = None
    if limits is None:
        if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
            what = f"more than the {Image.MAX_IMAGE_PIXELS} that are safe to decode (PIL.Image.MAX_IMAGE_PIXELS)"
    elif pixels > limits.pixels:
        what = f"more than {limits.pixels}"
    elif longer > limits.side:
        what = f"a side longer than {limits.side}"
    elif longer > limits.aspect * shorter:
        what = f"one side more than {limits.aspect} times the other"
    if what is not None:
        raise ImageTooLargeError(f"Refused image {name}: {size[0]}x{size[1]} pixels, {what}.")


def image_data_url(image: Image.Image) -> str:
    """An image as a `data:image/png;base64,` string, which `load_image` reads back pixel for pixel."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"

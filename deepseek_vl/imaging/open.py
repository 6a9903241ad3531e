"""Pictures from files, bytes and data URLs: the one place that opens them."""

import base64
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image, ImageOps


class ImageLoadError(OSError, ValueError):
    """An image cannot be read. An `OSError` as Pillow's own errors are, and a `ValueError` as bad input is."""


class ImageTooLargeError(ImageLoadError):
    """An image has more pixels than may be decoded, or is too long or too narrow."""


@dataclass(frozen=True)
class PictureLimits:
    """What is decoded of pictures that strangers send. All but `seconds` and `memory_bytes` is checked in the header.

    Attributes:
        formats: kinds of files, by Pillow's names.
        pixels: width times height.
        side: the longer side in pixels.
        aspect: how many times longer than the other side it may be.
        seconds: until a picture must be decoded, see `deepseek_vl.imaging.worker`.
        memory_bytes: address space of the process that decodes it.
    """

    formats: tuple[str, ...]
    pixels: int
    side: int
    aspect: int
    seconds: float
    memory_bytes: int


def load_image(source: Any, limits: PictureLimits | None = None) -> Image.Image:
    """One RGB image, turned upright as its EXIF orientation says if it is read from a file.

    Of a file with several frames it is the first. Pictures of more than 8 bits per channel are scaled to 8.

    Args:
        source: a path (`str` or `Path`, `~` is expanded), a `data:` URL, bytes, a binary file object, or a PIL image.
        limits: for pictures of strangers; None for all formats and as many pixels as `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        ImageLoadError: naming the source and the cause: missing, not an image, broken, or truncated.
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
    """The image in RGB. Numbers of more than 8 bits are scaled, where Pillow alone would cut off what is above 255."""
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
        else:  # numbers up to 1 are parts of one
            scale = 255.0 if 0 < highest <= 1 else 1.0
        image = image.point(lambda value: value * scale).convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def _open_source(source: Any) -> tuple[str, Any]:
    """A name for error messages, which repeats no content, and what `Image.open` takes."""
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
    """A name in quotes, its middle left out if it is long: it may be a picture's content that was taken for a path."""
    return repr(name if len(name) <= 300 else f"{name[:60]}...{name[-30:]}")


def data_url_bytes(url: str) -> bytes:
    """What a `data:` URL holds, as browsers read it: percent-encoded or base64, whatever type it claims.

    Raises:
        ImageLoadError: if it has no comma, or is not base64 although it says so.
    """
    header, comma, payload = url.partition(",")
    if not comma:
        raise ImageLoadError("Cannot read image in the data URL: it has no comma between its type and its content.")
    content = unquote_to_bytes(payload.partition("#")[0])
    if header.replace(" ", "").lower().endswith(";base64"):
        content = b"".join(content.split())
        try:
            content = base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
        except ValueError as error:
            raise ImageLoadError(f"Cannot read image in the data URL: not base64 ({error}).") from error
    return content


def _check_size(name: str, size: tuple[int, int], limits: PictureLimits | None) -> None:
    """Refuse an image by its header."""
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

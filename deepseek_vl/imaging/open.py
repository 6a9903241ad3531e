"""Pictures from files, bytes and data URLs: the one place that opens them."""

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps


class ImageLoadError(OSError, ValueError):
    """An image cannot be read. An `OSError` as Pillow's own errors are, and a `ValueError` as bad input is."""


class ImageTooLargeError(ImageLoadError):
    """An image has too many pixels to be decoded safely."""


def load_image(source: Any, formats: Sequence[str] | None = None, max_pixels: int | None = None) -> Image.Image:
    """One RGB image, turned upright as its EXIF orientation says if it is read from a file.

    Args:
        source: a path (`str` or `Path`, `~` is expanded), a `data:image/...;base64,` string, bytes, a binary file
            object, or a PIL image.
        formats: the only kinds of files that are read, by Pillow's names (`PNG`, `JPEG`, ...); None for all.
        max_pixels: of an image; None for `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        ImageLoadError: naming the source and the cause: missing, not an image, broken, or truncated.
        ImageTooLargeError: for an image with more pixels than that.
    """
    if max_pixels is None:
        max_pixels = Image.MAX_IMAGE_PIXELS
    if isinstance(source, Image.Image):
        name = repr(getattr(source, "filename", "")) if getattr(source, "filename", "") else "given as a PIL image"
    else:
        name, file = _open_source(source)
    try:
        # Pillow's decoders raise many types on broken files (OSError, SyntaxError, struct.error, ...).
        if isinstance(source, Image.Image):
            _refuse_bomb(name, source, max_pixels)
            source.load()
            return source if source.mode == "RGB" else source.convert("RGB")
        with Image.open(file, formats=formats) as image:
            _refuse_bomb(name, image, max_pixels)
            return ImageOps.exif_transpose(image).convert("RGB")
    except ImageLoadError:
        raise
    except FileNotFoundError as error:
        raise ImageLoadError(f"Cannot read image {name}: there is no such file.") from error
    except Image.UnidentifiedImageError as error:
        raise ImageLoadError(f"Cannot read image {name}: not an image file, or of an unknown kind.") from error
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"Refused image {name}: {error}") from error
    except OSError as error:
        raise ImageLoadError(f"Cannot read image {name}: {error.strerror or error}.") from error
    except Exception as error:
        raise ImageLoadError(f"Cannot read image {name}: broken file ({error}).") from error


def _open_source(source: Any) -> tuple[str, Any]:
    """A name for error messages, and what `Image.open` takes."""
    if isinstance(source, str) and source.startswith("data:"):
        header, _, payload = source.partition(",")
        if not header.startswith("data:image/") or not header.endswith(";base64"):
            raise ImageLoadError(f"Cannot read image data URL {header[:40]!r}: it must be 'data:image/...;base64,...'.")
        try:
            data = base64.b64decode("".join(payload.split()), validate=True)
        except ValueError as error:  # also what is not ASCII
            raise ImageLoadError(f"Cannot read image in the data URL: not base64 ({error}).") from error
        return "in the data URL", io.BytesIO(data)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ImageLoadError(f"Cannot read image {source!r}: URLs are not fetched; download it and give its path.")
    if isinstance(source, (str, Path)):
        return repr(str(source)), os.path.expanduser(source)  # noqa: PTH111  Path's raises for unknown users
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "in the given bytes", io.BytesIO(source)
    if hasattr(source, "read"):
        return repr(getattr(source, "name", type(source).__name__)), source
    raise ImageLoadError(f"Cannot read an image from {type(source).__name__}; give a path, bytes, file or PIL image.")


def _refuse_bomb(name: str, image: Image.Image, max_pixels: int | None) -> None:
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise ImageTooLargeError(
            f"Refused image {name}: {width}x{height} pixels, more than the {max_pixels} that are safe to decode "
            "(PIL.Image.MAX_IMAGE_PIXELS)."
        )


def image_data_url(image: Image.Image) -> str:
    """An image as a `data:image/png;base64,` string, which `load_image` reads back pixel for pixel."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"

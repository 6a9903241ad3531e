"""Drawing a `Picture` with Pillow."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, singledispatch
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from recipes.tiny.world.scene import RGB, Chart, Picture, Shape, Word

FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "",
)
"""Fonts that come with matplotlib; the empty name is Pillow's own."""


@singledispatch
def draw(picture: Picture) -> Image.Image:
    """Draw a picture as an RGB image. Other classes of pictures register functions of their own."""
    image = draw_background(picture)
    canvas = ImageDraw.Draw(image)
    for shape in picture.shapes:
        draw_shape(canvas, shape, shape.tone)
    if picture.chart:
        _draw_chart(canvas, picture.chart)
    for word in picture.words:
        draw_word(image, word)
    return image


def draw_background(picture: Picture) -> Image.Image:
    """Draw a picture's background."""
    width, height = picture.width, picture.height
    first, second = (np.array(tone, dtype=np.float32) for tone in picture.background)
    rng = random.Random(picture.seed)
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    if picture.pattern == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        part = math.cos(angle) * x / width + math.sin(angle) * y / height
        part = (part - part.min()) / max(float(np.ptp(part)), 1e-6)
    elif picture.pattern == "checks":
        cell = rng.randint(8, 40)
        part = (x // cell + y // cell) % 2
    elif picture.pattern == "stripes":
        cell = rng.randint(6, 30)
        part = (rng.choice((x, y, x + y)) // cell) % 2
    elif picture.pattern == "noise":
        part = np.random.default_rng(picture.seed).random((height, width), dtype=np.float32)
    else:
        return Image.new("RGB", (width, height), picture.background[0])
    if picture.pattern in ("checks", "stripes"):  # two tones
        tones = np.array(picture.background, dtype=np.uint8)
        pixels = np.broadcast_to(tones[part.astype(np.intp)], (height, width, 3))
    else:
        # Band by band: an operation along an axis of three is slow.
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        for band in range(3):
            pixels[..., band] = np.rint(first[band] + part * (second[band] - first[band]))
    return Image.fromarray(pixels)


def _polygon(shape: Shape, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Turn, scale and move points in the unit circle (y down) to a shape's place in the picture."""
    angle = math.radians(shape.angle)
    cos, sin = math.cos(angle) * shape.radius, math.sin(angle) * shape.radius
    return [(shape.x + cos * x - sin * y, shape.y + sin * x + cos * y) for x, y in points]


def _star() -> list[tuple[float, float]]:
    radii = [1 if i % 2 == 0 else 0.42 for i in range(10)]
    return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]


def _heart() -> list[tuple[float, float]]:
    curve = [2 * math.pi * i / 40 for i in range(40)]
    x = [16 * math.sin(t) ** 3 for t in curve]
    y = [-(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) for t in curve]
    return [(a / 17.5, (b - 2) / 17.5) for a, b in zip(x, y, strict=True)]


_SQUARE, _ARM = math.sqrt(0.5), 0.3
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-_SQUARE, -_SQUARE), (_SQUARE, -_SQUARE), (_SQUARE, _SQUARE), (-_SQUARE, _SQUARE)],
    "triangle": [(0, -1), (0.87, 0.5), (-0.87, 0.5)],
    "star": _star(),
    "diamond": [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)],
    "cross": [
        (-_ARM, -0.95), (_ARM, -0.95), (_ARM, -_ARM), (0.95, -_ARM), (0.95, _ARM), (_ARM, _ARM),
        (_ARM, 0.95), (-_ARM, 0.95), (-_ARM, _ARM), (-0.95, _ARM), (-0.95, -_ARM), (-_ARM, -_ARM),
    ],
    "heart": _heart(),
}  # fmt: skip


def draw_shape(canvas: ImageDraw.ImageDraw, shape: Shape, tone: RGB) -> None:
    """Draw a shape in a tone, which need not be its own."""
    x, y, r = shape.x, shape.y, shape.radius
    if shape.kind == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=tone)
    elif shape.kind == "ring":
        canvas.ellipse((x - r, y - r, x + r, y + r), outline=tone, width=max(2, round(r * 0.36)))
    else:
        canvas.polygon(_polygon(shape, shape.outline or OUTLINES[shape.kind]), fill=tone)


def bars(chart: Chart) -> Iterator[tuple[float, float, float, float]]:
    """The rectangles (left, top, right, bottom) of a chart's bars."""
    left, top, right, bottom = chart.box
    slot = (right - left) / len(chart.values)
    for i, value in enumerate(chart.values):
        x = left + slot * (i + chart.gap / 2)
        yield x, bottom - (bottom - top) * value, x + slot * (1 - chart.gap), bottom


def _draw_chart(canvas: ImageDraw.ImageDraw, chart: Chart) -> None:
    left, top, right, bottom = chart.box
    line = max(1, round((bottom - top) / 100))
    if chart.grid:
        for i in range(1, 5):
            y = bottom - (bottom - top) * i / 4
            canvas.line((left, y, right, y), fill=(150, 150, 150), width=1)
    for tone, box in zip(chart.tones, bars(chart), strict=True):
        canvas.rectangle(box, fill=tone, outline=chart.ink if chart.frame else None)
    canvas.line((left, bottom, right, bottom), fill=chart.ink, width=line)
    canvas.line((left, top, left, bottom), fill=chart.ink, width=line)


@cache
def font_of_size(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of `FONTS`, by its name, in a size."""
    if not name:
        return ImageFont.load_default(size)
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


@dataclass(frozen=True)
class Line:
    """A typeset word on a card of `size` pixels; its text is anchored at `x`, `y` and `margin` from the edge."""

    font: ImageFont.FreeTypeFont
    size: tuple[int, int]
    margin: int
    x: float
    y: float


def typeset(word: Word) -> Line:
    """Choose the font and the size that fit a word into its width and height."""
    name = FONTS[word.font % len(FONTS)]
    left, top, right, bottom = font_of_size(name, 64).getbbox(word.text)
    # Upper-case letters and digits set the height, so that "x" is not blown up to the size of "X".
    _, cap_top, _, cap_bottom = font_of_size(name, 64).getbbox("X")
    scale = min(word.width / (right - left), word.height / max(bottom - top, cap_bottom - cap_top))
    font = font_of_size(name, max(8, int(64 * scale)))
    left, top, right, bottom = font.getbbox(word.text)
    margin = max(2, round((bottom - top) * 0.25))
    size = (round(right - left) + 2 * margin, round(bottom - top) + 2 * margin)
    return Line(font, size, margin, margin - left, margin - top)


def draw_word(image: Image.Image, word: Word) -> None:
    """Draw a word, and the card that it stands on."""
    line = typeset(word)
    mask = Image.new("L", line.size, 0)
    ImageDraw.Draw(mask).text((line.x, line.y), word.text, fill=255, font=line.font)
    if word.card:
        card = Image.new("L", line.size, 255)
        image.paste(word.card, *turned(card, word))
    image.paste(word.tone, *turned(mask, word))


def turned(
    mask: Image.Image, word: Word, filter: Image.Resampling = Image.Resampling.BICUBIC
) -> tuple[tuple[int, int], Image.Image]:
    """A word's mask turned by its angle: the corner at which it is pasted, and the mask."""
    if word.angle:
        mask = mask.rotate(word.angle, filter, expand=True)
    return (round(word.x) - mask.width // 2, round(word.y) - mask.height // 2), mask

"""Pictures that are not of the synthetic world, so that a model learns to say what it does not know."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from recipes.tiny.world.draw import draw
from recipes.tiny.world.elsewhere.documents import DOCUMENTS
from recipes.tiny.world.elsewhere.scenes import SCENES
from recipes.tiny.world.elsewhere.textures import TEXTURES
from recipes.tiny.world.elsewhere.things import draw_things

SOMETHING_ELSE = "I know drawn shapes, words and charts only, and this picture shows something else."
"""The answer to every question about such a picture."""

Painter = Callable[[np.random.Generator, int, int], Image.Image]
"""(source of randomness, width, height) -> an RGB image of that size."""

KINDS: dict[str, tuple[tuple[Painter, ...], float]] = {
    "textures": (TEXTURES, 22),
    "scenes": (SCENES, 34),
    "things": ((draw_things,), 28),
    "documents": (DOCUMENTS, 16),
}
"""The painters of pictures that are not from a photograph, and how often each group is used, in percent."""


@dataclass(frozen=True)
class Elsewhere:
    """A picture that is not of the synthetic world; it depends on the seed and the photographs alone.

    Attributes:
        seed: of all random choices.
        photographs: files; half of the pictures are parts of them. Without any, all are drawn.
    """

    seed: int
    photographs: tuple[Path, ...] = ()


@draw.register
def draw_elsewhere(picture: Elsewhere) -> Image.Image:
    """The picture as an RGB image."""
    rng = random.Random(f"elsewhere {picture.seed}")
    if picture.photographs and rng.random() < 0.5:
        image = _crop(rng.choice(picture.photographs), rng)
    else:
        long_side = rng.randint(160, 360)
        short_side = round(long_side * rng.uniform(0.6, 1))
        width, height = rng.choice(((long_side, short_side), (long_side, short_side), (short_side, long_side)))
        painters, shares = zip(*KINDS.values(), strict=True)
        paint = rng.choice(rng.choices(painters, shares)[0])
        image = paint(np.random.default_rng(picture.seed), width, height)
    if rng.random() < 0.1:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 2.5)))
    return image


@lru_cache(maxsize=128)
def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _crop(path: Path, rng: random.Random) -> Image.Image:
    """A part of a photograph, at least 40 % of its short side, turned over and lightened or darkened at times."""
    image = _open(path)
    short = min(image.size)
    least = max(8, round(0.4 * short))
    width, height = (
        (image.width, image.height) if rng.random() < 0.25 else tuple(rng.randint(least, side) for side in image.size)
    )
    # At most twice as long as wide, because the model pads to a square.
    width, height = min(width, 2 * height), min(height, 2 * width)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    part = image.crop((left, top, left + width, top + height))
    part.thumbnail((400, 400), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        part = ImageOps.mirror(part)
    if rng.random() < 0.3:
        part = ImageEnhance.Brightness(part).enhance(rng.uniform(0.6, 1.4))
    if rng.random() < 0.3:
        part = ImageEnhance.Color(part).enhance(rng.uniform(0.3, 1.6))
    return part

"""Segmentation maps of pictures: what is drawn where, to pretrain a vision tower."""

import random
import string

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from recipes.tiny.world.draw import bars, draw, draw_shape, turned, typeset
from recipes.tiny.world.scene import COLOURS, SHAPES, Picture, sample_picture

THINGS = ("", *SHAPES, "bar", "tallest", "shortest", *string.digits, *string.ascii_letters)
COLOUR_NAMES = ("", *COLOURS)
MOST = 5
"""Shapes (from left to right), bars, and the letters of a word are numbered from 1 to this."""

CHANNELS = (len(THINGS), len(COLOUR_NAMES), MOST + 1)
"""How many values a map's three channels have: thing, colour, number. All are 0 where nothing is drawn."""

KINDS = {"page": 50, "words": 15, "shapes": 20, "mixed": 5, "chart": 10}
"""Which kinds of pictures maps are of, and how often, in percent."""


def draw_map(picture: Picture) -> Image.Image:
    """The picture's map, as an RGB image of the same size: `CHANNELS` in place of tones, a box in place of a letter."""
    image = Image.new("RGB", (picture.width, picture.height))
    canvas = ImageDraw.Draw(image)
    for i, shape in enumerate(sorted(picture.shapes, key=lambda shape: shape.x)):
        draw_shape(canvas, shape, _values(shape.kind, shape.colour, i))
    if chart := picture.chart:
        for i, box in enumerate(bars(chart)):
            which = {chart.bar("tallest"): "tallest", chart.bar("shortest"): "shortest"}.get(chart.colours[i], "bar")
            canvas.rectangle(box, fill=_values(which, chart.colours[i], i))
    for word in picture.words:
        line = typeset(word)
        for i, letter in enumerate(word.text):
            mask = Image.new("L", line.size)
            left, right = (line.x + line.font.getlength(word.text[:end]) for end in (i, i + 1))
            box = (left, line.margin, right - 1, line.size[1] - line.margin)
            ImageDraw.Draw(mask).rectangle(box, fill=255)
            image.paste(_values(letter, word.colour, i), *turned(mask, word, Image.Resampling.NEAREST))
    return image


def _values(thing: str, colour: str, index: int) -> tuple[int, int, int]:
    return THINGS.index(thing), COLOUR_NAMES.index(colour), min(index + 1, MOST)


def sample_grid(image: Image.Image, side: int) -> torch.Tensor:
    """A map's values at the centres of `side` by `side` cells of the square that the processor pads the picture to.

    Returns:
        int64 [side, side, 3]
    """
    values = np.asarray(image)
    height, width = values.shape[:2]
    square = max(height, width)
    centres = (np.arange(side) + 0.5) * square / side
    grid = np.zeros((side, side, 3), dtype=np.int64)
    rows, columns = (np.floor(centres - (square - length) / 2).astype(int) for length in (height, width))
    inside = [(index >= 0) & (index < length) for index, length in ((rows, height), (columns, width))]
    grid[np.ix_(*inside)] = values[np.ix_(rows[inside[0]], columns[inside[1]])]
    return torch.from_numpy(grid)


class SegmentationMaps(Dataset):
    """`length` pairs of a picture and its map; number `index` depends on `seed` and `index` only."""

    def __init__(self, length: int, seed: int = 0):
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Pair `index`: the picture, and its map.

        Raises:
            IndexError: outside 0 to length - 1, which ends iteration.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"There is no map {index} among {self.length}.")
        rng = random.Random(f"map {self.seed}/{index}")
        picture = sample_picture(rng, rng.choices(list(KINDS), list(KINDS.values()))[0])
        return draw(picture), draw_map(picture)

"""The sample pictures of this repository, which the world's questions can be asked about."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from recipes.tiny.world.draw import draw
from recipes.tiny.world.scene import COLOURS, Chart, Picture, Shape, Word

IMAGES = Path(__file__).parents[3] / "images"


@dataclass(frozen=True)
class SamplePicture(Picture):
    """A sample picture of this repository, described as the world's pictures are.

    Attributes:
        file: its file in `images`.
    """

    file: str = ""


@draw.register
def open_sample(picture: SamplePicture) -> Image.Image:
    """The picture as an RGB image."""
    with Image.open(IMAGES / picture.file) as image:
        return image.convert("RGB")


def _sample(file: str, page: tuple[int, int, int], **things: Any) -> SamplePicture:
    return SamplePicture(480, 360, (page, page), "plain", 0, **things, file=file)


def _shape(kind: str, colour: str, x: float, y: float, radius: float) -> Shape:
    return Shape(kind, colour, COLOURS[colour][0], x, y, radius, 0)


SAMPLES: dict[str, SamplePicture] = {
    "shapes": _sample(
        "shapes.png",
        (244, 241, 232),
        shapes=(
            _shape("circle", "red", 110, 100, 62),
            _shape("star", "blue", 350, 110, 78),
            _shape("square", "green", 115, 270, 78),
            _shape("circle", "red", 300, 270, 58),
        ),
    ),
    "more_shapes": _sample(
        "more_shapes.png",
        (231, 239, 248),
        shapes=(_shape("triangle", "yellow", 120, 140, 80), _shape("diamond", "purple", 330, 225, 75)),
    ),
    "chart": _sample(
        "chart.png",
        (255, 255, 255),
        chart=Chart(
            ("red", "blue", "green", "orange"),
            tuple(COLOURS[name][0] for name in ("red", "blue", "green", "orange")),
            tuple(height / 290 for height in (120, 255, 180, 70)),
            (50, 30, 440, 320),
            0.3,
            False,
            False,
            (48, 48, 48),
        ),
    ),
    "word": _sample(
        "word.png",
        (255, 255, 255),
        words=(Word("HELLO", "blue", COLOURS["blue"][0], 240, 180, 400, 80, 0, 0, None),),
    ),
}
"""The sample pictures by what they show, as `images/draw.py` draws them."""

KIND_OF_SAMPLE = {"shapes": "shapes", "more_shapes": "shapes", "chart": "chart", "word": "words"}

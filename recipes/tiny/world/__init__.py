"""A synthetic world without end: pictures of shapes, words and bar charts, with questions and their right answers.

Every conversation is a function of (seed, index) alone, so a data set needs no files and can be resumed anywhere.
"""

from recipes.tiny.world.dataset import ByLength, Captions, HardQuestions, SyntheticWorld, write_world
from recipes.tiny.world.draw import draw
from recipes.tiny.world.maps import Maps
from recipes.tiny.world.scene import COLOURS, SHAPES, Chart, Picture, Shape, Word, sample_picture

__all__ = [
    "COLOURS",
    "SHAPES",
    "ByLength",
    "Captions",
    "Chart",
    "HardQuestions",
    "Maps",
    "Picture",
    "Shape",
    "SyntheticWorld",
    "Word",
    "draw",
    "sample_picture",
    "write_world",
]

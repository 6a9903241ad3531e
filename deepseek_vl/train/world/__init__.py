"""A synthetic world without end: pictures of shapes, words and bar charts, with questions and their right answers.

Every conversation is a function of (seed, index) alone, so a data set needs no files and can be resumed anywhere.
"""

from deepseek_vl.train.world.dataset import ByLength, Captions, HardQuestions, SyntheticWorld, write_world
from deepseek_vl.train.world.draw import draw
from deepseek_vl.train.world.maps import Maps
from deepseek_vl.train.world.scene import COLOURS, SHAPES, Chart, Picture, Shape, Word, sample_picture

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

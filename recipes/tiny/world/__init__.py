"""A synthetic world without end: pictures of shapes, words and bar charts, with questions and their right answers.

Every conversation is a function of (seed, index) alone, so a data set needs no files and can be resumed anywhere.

For a world of your own give `Conversations` a sampler: a function that returns pictures and questions. It can use
`sample_picture`, the `ask_` functions of `recipes.tiny.world.questions` and, for a new shape, `Shape.outline`;
`examples/hexagons.py` does so.
"""

from recipes.tiny.world.dataset import (
    Captions,
    Conversations,
    HardQuestions,
    LengthGrouped,
    SyntheticWorld,
    write_conversations,
)
from recipes.tiny.world.draw import draw
from recipes.tiny.world.elsewhere import SOMETHING_ELSE, Elsewhere
from recipes.tiny.world.maps import SegmentationMaps
from recipes.tiny.world.paint import PaintedPicture, sample_painted
from recipes.tiny.world.scene import COLOURS, SHAPES, Chart, Picture, Shape, Word, sample_picture
from recipes.tiny.world.wider import WiderConversations

__all__ = [
    "COLOURS",
    "SHAPES",
    "SOMETHING_ELSE",
    "Captions",
    "Chart",
    "Conversations",
    "Elsewhere",
    "HardQuestions",
    "LengthGrouped",
    "PaintedPicture",
    "Picture",
    "SegmentationMaps",
    "Shape",
    "SyntheticWorld",
    "WiderConversations",
    "Word",
    "draw",
    "sample_painted",
    "sample_picture",
    "write_conversations",
]

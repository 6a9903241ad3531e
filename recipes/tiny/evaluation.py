"""The command `python -m recipes.tiny.evaluation`: writes what the small model is evaluated on.

Each data set is a directory with `data.jsonl` for `python -m deepseek_vl.train.evaluate --data`:

- `world-1`, `world-2`: the synthetic world in its own words, of two seeds; the README's table is of these;
- `wider-1`, `wider-2`: the wider world, with other wordings, further questions and other styles of drawing;
- `things`: questions about things that no conversation for training names;
- `samples`: this repository's own sample pictures, with all questions, in all orders;
- `elsewhere`: drawn pictures that are not of the world;
- `drawings`: this repository's own drawings of other things;
- `photographs`: photographs, if there are any.
"""

import argparse
import logging
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from deepseek_vl.command_line import OneLineParser, positive, run_command
from deepseek_vl.data.rows import TrainingRow
from recipes.tiny.photographs import image_files
from recipes.tiny.world import (
    COLOURS,
    SOMETHING_ELSE,
    Chart,
    Conversations,
    Picture,
    Shape,
    SyntheticWorld,
    WiderConversations,
    Word,
    draw,
    sample_picture,
    write_conversations,
)
from recipes.tiny.world.dataset import TAG, take_turns
from recipes.tiny.world.questions import Turn, ask
from recipes.tiny.world.two_pictures import ask_shared, ask_two
from recipes.tiny.world.wider import MORE, reword_some
from recipes.tiny.world.wider_questions import UNSEEN_THINGS, ask_unknown_thing

logger = logging.getLogger(__name__)

IMAGES = Path(__file__).parents[2] / "images"
SEEDS = (1, 2)
"""The seeds of the worlds to evaluate on; nothing is trained on these."""

QUESTIONS_ABOUT_OTHERS = (
    "What is this?", "Describe the image.", "What do you see?", "What is in the picture?", "What colour is the star?",
    "How many shapes are there?", "What does it say?", "Where is the circle?", "Which bar is the tallest?",
    "Is there a dog?",
)  # fmt: skip
"""Questions about pictures that are not of the world, one for each picture, in turn."""


OTHER_DRAWINGS = (
    "dog_a.png", "dog_b.png", "dog_c.png", "dog_d.png", "serving.png", "training_pipelines.png",
)  # fmt: skip
"""Files in `images` that are not of the world."""


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


def sample_about_samples(rng: random.Random, turns: int) -> tuple[list[Picture], list[Turn]]:
    """Questions about the sample pictures, in the world's words or reworded; a sampler for `Conversations`."""
    if rng.random() < 0.2:
        names = ["shapes", rng.choice(("more_shapes", "more_shapes", "chart", "word"))]
        rng.shuffle(names)
        pictures: list[Picture] = [SAMPLES[name] for name in names]
        questions = ask_two(pictures, rng, ((ask_shared, 2.5),))
    else:
        name = rng.choice(("shapes", "shapes", "more_shapes", "chart", "word"))
        pictures = [SAMPLES[name]]
        questions = ask(pictures[0], KIND_OF_SAMPLE[name], rng, MORE)
    return pictures, reword_some(take_turns(questions, turns), rng)


def sample_unseen_thing(rng: random.Random, turns: int) -> tuple[list[Picture], list[Turn]]:
    """A question about a thing that no conversation for training names; a sampler for `Conversations`."""
    picture = sample_picture(rng, rng.choice(("shapes", "shapes", "words", "chart")))
    turn = ask_unknown_thing(picture, rng, UNSEEN_THINGS)
    return [picture], reword_some([turn], rng)


class OtherPictures(Dataset):
    """One question about each of some files, answered like every question about what is not of the world.

    Args:
        files: pictures.
        type: of the questions.
    """

    def __init__(self, files: Sequence[Path], type: str):
        self.files = files
        self.type = type

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> TrainingRow:
        file = self.files[index]
        with Image.open(file) as image:
            image.draft("RGB", (640, 640))
            small = image.convert("RGB")
        small.thumbnail((640, 640))
        question = QUESTIONS_ABOUT_OTHERS[index % len(QUESTIONS_ABOUT_OTHERS)]
        messages = [
            {"role": "User", "content": TAG + question, "images": [small]},
            {"role": "Assistant", "content": SOMETHING_ELSE},
        ]
        return TrainingRow(messages, None, (self.type,), origin=str(file))


def data_sets(rows: int, photographs: Sequence[Path]) -> dict[str, Dataset]:
    """All data sets by their names.

    Args:
        rows: how many the larger ones have.
        photographs: files.
    """
    few = max(1, rows // 4)
    sets: dict[str, Dataset] = {}
    for seed in SEEDS:
        sets[f"world-{seed}"] = SyntheticWorld(rows, seed, turns=1)
        sets[f"wider-{seed}"] = WiderConversations(rows, seed, turns=1, elsewhere=0)
    sets["things"] = Conversations(sample_unseen_thing, few, SEEDS[0], turns=1)
    sets["samples"] = Conversations(sample_about_samples, few, SEEDS[0])
    sets["elsewhere"] = WiderConversations(few, SEEDS[0], turns=1, elsewhere=1)
    sets["drawings"] = OtherPictures([IMAGES / name for name in OTHER_DRAWINGS], "drawing")
    if photographs:
        sets["photographs"] = OtherPictures(photographs, "photograph")
    return sets


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the data sets; returns the exit code."""
    parser = OneLineParser(prog="python -m recipes.tiny.evaluation", description="Write data sets to evaluate on.")
    parser.add_argument("--output", type=Path, required=True, help="directory for the data sets")
    parser.add_argument("--rows", type=positive, default=1800, help="of the larger data sets (default: %(default)s)")
    parser.add_argument("--photographs", type=Path, nargs="+", default=[], metavar="DIR", help="to test with")

    def run(args: argparse.Namespace) -> None:
        photographs = image_files(args.photographs)
        for name, conversations in data_sets(args.rows, photographs).items():
            logger.info("Wrote %s", write_conversations(conversations, args.output / name))

    return run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())

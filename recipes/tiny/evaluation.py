"""The command `python -m recipes.tiny.evaluation`: writes what the small model is evaluated on.

Each data set is a directory with `data.jsonl` for `python -m deepseek_vl.train.evaluate --data`:

- `world-1`, `world-2`: the synthetic world in its own words, of two seeds; the README's table is of these;
- `wider-1`, `wider-2`: the wider world, with other wordings, further questions and other styles of drawing;
- `things`: questions about things that no conversation for training names;
- `samples`: this repository's own sample pictures, with all questions, in all orders; these pictures are trained on;
- `elsewhere`: drawn pictures that are not of the world;
- `drawings`: this repository's own drawings of other things;
- `photographs`: photographs, if there are any.
"""

import argparse
import logging
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from deepseek_vl.command_line import OneLineParser, positive, run_command
from deepseek_vl.data.rows import TrainingRow
from recipes.tiny.photographs import image_files
from recipes.tiny.world import (
    SOMETHING_ELSE,
    Conversations,
    Picture,
    SyntheticWorld,
    WiderConversations,
    sample_picture,
    write_conversations,
)
from recipes.tiny.world.dataset import TAG
from recipes.tiny.world.questions import Turn
from recipes.tiny.world.samples import IMAGES
from recipes.tiny.world.wider import reword_some, sample_about_samples
from recipes.tiny.world.wider_questions import UNSEEN_THINGS, ask_unknown_thing

logger = logging.getLogger(__name__)

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

"""Teach a model a shape it has never seen: writes conversations about hexagons for fine-tuning.

python examples/hexagons.py --output hexagons --rows 200 --others 80
python examples/hexagons.py --output hexagons-test --rows 200 --seed 1 --turns 1
"""

import argparse
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch.utils.data import ConcatDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipe is in the checkout, not in the package
from recipes.tiny.world import Picture, SyntheticWorld, sample_picture, write_world
from recipes.tiny.world.draw import OUTLINES
from recipes.tiny.world.questions import Turn, ask_colour, ask_count, ask_is_there, ask_place, ask_shape

OUTLINES["hexagon"] = [(math.cos(math.pi * i / 3), math.sin(math.pi * i / 3)) for i in range(6)]


class Hexagons(SyntheticWorld):
    """Pictures in which one shape is a hexagon, and questions whose question or answer is about it."""

    def _sample(self, rng: random.Random) -> tuple[list[Picture], list[Turn]]:
        picture = sample_picture(rng, "shapes")
        changed = rng.randrange(len(picture.shapes))
        shapes = [replace(shape, kind="hexagon") if i == changed else shape for i, shape in enumerate(picture.shapes)]
        picture = replace(picture, shapes=tuple(shapes))
        turns: dict[str, Turn] = {}
        for turn in self._ask(picture, rng):
            turns.setdefault(turn.answer, turn)
            if len(turns) == self.turns:
                break
        return [picture], list(turns.values())

    def _ask(self, picture: Picture, rng: random.Random) -> Iterator[Turn]:
        for _ in range(200):
            turn = rng.choice((ask_colour, ask_shape, ask_place, ask_count, ask_is_there))(picture, rng)
            if turn and "hexagon" in turn.question + turn.answer:
                yield turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--others", type=int, default=0, help="conversations about other pictures, to keep old skills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=4)
    args = parser.parse_args()
    hexagons = Hexagons(args.rows, args.seed, args.turns)
    others = SyntheticWorld(args.others, args.seed, args.turns)
    write_world(ConcatDataset([hexagons, others]), args.output)


if __name__ == "__main__":
    main()

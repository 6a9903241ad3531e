"""Teach a model a shape it has never seen: writes conversations about hexagons for fine-tuning.

python examples/hexagons.py --output hexagons --rows 100 --others 100 --turns 6
python examples/hexagons.py --output hexagons-test --rows 100 --turns 1 --seed 1
"""

import argparse
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

from torch.utils.data import ConcatDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipe is in the checkout, not in the package
from recipes.tiny.world import Conversations, Picture, SyntheticWorld, sample_picture, write_conversations
from recipes.tiny.world.questions import Turn, ask_colour, ask_count, ask_is_there, ask_place, ask_shape

CORNERS = tuple((math.cos(math.pi * i / 3), math.sin(math.pi * i / 3)) for i in range(6))


def sample_hexagon(rng: random.Random, turns: int) -> tuple[list[Picture], list[Turn]]:
    """A picture in which one shape is a hexagon, and questions whose question or answer is about it."""
    picture = sample_picture(rng, "shapes")
    shapes = list(picture.shapes)
    changed = rng.randrange(len(shapes))
    shapes[changed] = replace(shapes[changed], kind="hexagon", outline=CORNERS)
    picture = replace(picture, shapes=tuple(shapes))
    asked: dict[str, Turn] = {}
    for _ in range(200):
        turn = rng.choice((ask_colour, ask_shape, ask_place, ask_count, ask_is_there))(picture, rng)
        if turn and "hexagon" in turn.question + turn.answer:
            asked.setdefault(turn.answer, turn)
        if len(asked) == turns:
            break
    return [picture], list(asked.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--others", type=int, default=0, help="conversations about other pictures, to keep old skills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=4)
    args = parser.parse_args()
    hexagons = Conversations(sample_hexagon, args.rows, args.seed, args.turns)
    others = SyntheticWorld(args.others, args.seed, args.turns)
    write_conversations(ConcatDataset([hexagons, others]), args.output)


if __name__ == "__main__":
    main()

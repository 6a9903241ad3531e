"""Conversations about the synthetic world, as a data set and as files."""

import itertools
import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from deepseek_vl.data.rows import TrainingRow
from recipes.tiny.world.draw import draw
from recipes.tiny.world.questions import (
    Askers,
    Turn,
    ask,
    ask_absent,
    ask_count,
    ask_place,
    ask_repeated,
    ask_shared,
    ask_two,
    describe,
    small_talk,
)
from recipes.tiny.world.scene import Picture, sample_picture, share_shape

TAG = "<image_placeholder>"
KINDS = {"shapes": 40, "words": 28, "chart": 9, "mixed": 8, "two": 13, "talk": 2}
"""How often a conversation is about what, in percent."""


class SyntheticWorld(Dataset):
    """`length` conversations; number `index` depends on `seed` and `index` only.

    Args:
        length: how many.
        seed: another seed is another world of the same kind.
        turns: most questions in a conversation; with 1, there is one question, or one and its follow-up.

    Attributes:
        kinds: how often a conversation is about what, in percent.
        more, more_of_two: who asks about one picture, or about two, beside those who always do.
        alike: which part of the pairs of pictures is made to share a shape.
    """

    kinds: Mapping[str, float] = KINDS
    more: Askers = ()
    more_of_two: Askers = ()
    alike: float = 0

    def __init__(self, length: int, seed: int = 0, turns: int = 6):
        self.length = length
        self.seed = seed
        self.turns = turns

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> TrainingRow:
        """
        Raises:
            IndexError: outside 0 to length - 1, which ends iteration.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"There is no conversation {index} in a world of {self.length}.")
        rng = random.Random(f"{self.seed}/{index}")
        pictures, turns = self._sample(rng)
        messages: list[dict[str, Any]] = []
        for i, turn in enumerate(turns):
            content, images = turn.question, []
            if i == 0 and pictures:
                content = _with_tags(turn.question, len(pictures), rng)
                images = [draw(picture) for picture in pictures]
            messages.append({"role": "User", "content": content, "images": images})
            messages.append({"role": "Assistant", "content": turn.answer})
        types = tuple(turn.type for turn in turns)
        return TrainingRow(messages=messages, types=types, origin=f"world {self.seed}:{index}")

    def turns_of(self, index: int) -> list[Turn]:
        """What is said in a conversation, without drawing its pictures."""
        return self._sample(random.Random(f"{self.seed}/{index}"))[1]

    def length_of(self, index: int) -> int:
        """About how long a conversation is, in characters; a picture counts as many as have its number of tokens."""
        pictures, turns = self._sample(random.Random(f"{self.seed}/{index}"))
        return 250 * len(pictures) + sum(len(turn.question) + len(turn.answer) + 20 for turn in turns)

    def _sample(self, rng: random.Random) -> tuple[list[Picture], list[Turn]]:
        """The pictures and the questions of a conversation."""
        kind = rng.choices(list(self.kinds), list(self.kinds.values()))[0]
        if kind == "talk":
            return [], [small_talk(rng) for _ in range(min(self.turns, rng.randint(1, 3)))]
        if kind == "two":
            kinds = [
                rng.choice(("shapes", "shapes", "mixed")),
                rng.choice(("shapes", "shapes", "mixed", "words", "chart")),
            ]
            rng.shuffle(kinds)
            pictures = [sample_picture(rng, kind) for kind in kinds]
            if self.alike and rng.random() < self.alike:
                pictures = share_shape(pictures, rng)
            questions = ask_two(pictures, rng, self.more_of_two)
        else:
            pictures = [sample_picture(rng, kind)]
            questions = ask(pictures[0], kind, rng, self.more)
        turns: list[Turn] = []
        for new in itertools.islice(questions, 30):
            # What was said already would be copied rather than seen.
            if not {turn.answer for turn in new} & {turn.answer for turn in turns}:
                turns += new
            if len(turns) >= self.turns:
                break
        return pictures, turns


class HardQuestions(SyntheticWorld):
    """The same world, asked more often what is learnt last: how many, where, whether there is one, which picture it is.

    What is rare by chance is asked for: several of a kind, and shapes that two pictures share.
    """

    kinds = {"shapes": 39, "words": 25, "chart": 3, "mixed": 8, "two": 23, "talk": 2}
    more = ((ask_place, 1), (ask_absent, 1), (ask_count, 1.5), (ask_repeated, 2.5))
    more_of_two = ((ask_shared, 2.5),)
    alike = 0.4


class Captions(SyntheticWorld):
    """Pictures with their descriptions, and nothing else in the prompt.

    A description names everything, so that a model without eyes learns to see from it sooner than from questions.
    """

    kinds = {"shapes": 50, "words": 40, "chart": 10}

    def __init__(self, length: int, seed: int = 0):
        super().__init__(length, seed, turns=1)

    def _sample(self, rng: random.Random) -> tuple[list[Picture], list[Turn]]:
        picture = sample_picture(rng, rng.choices(list(self.kinds), list(self.kinds.values()))[0])
        return [picture], [replace(describe(picture, rng), question="")]

    def __getitem__(self, index: int) -> TrainingRow:
        return replace(super().__getitem__(index), system="")


class ByLength(Dataset):
    """A world in an order in which the conversations of a batch are about equally long, so that little is padding.

    Within every `WINDOW` batches they are sorted by length; the batches then come in a random order.

    Args:
        world: the conversations.
        batch_size: how many follow each other.
    """

    WINDOW = 16

    def __init__(self, world: SyntheticWorld, batch_size: int):
        self.world = world
        self.batch_size = batch_size
        self._start, self._order = -1, []

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, index: int) -> TrainingRow:
        """
        Raises:
            IndexError: outside 0 to length - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"There is no conversation {index} in a world of {len(self)}.")
        window = self.WINDOW * self.batch_size
        start = index - index % window
        if start != self._start:
            indices = sorted(range(start, min(start + window, len(self))), key=self.world.length_of)
            batches = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
            random.Random(f"order {self.world.seed}/{start}").shuffle(batches)
            self._start, self._order = start, list(itertools.chain.from_iterable(batches))
        return self.world[self._order[index - start]]


def _with_tags(question: str, images: int, rng: random.Random) -> str:
    """The question with its image tags in front or behind, as people write them."""
    tags = TAG * images
    return rng.choice(
        (f"{tags}{question}", f"{tags}{question}", f"{tags}\n{question}", f"{tags} {question}", f"{question}{tags}")
    )


def write_world(world: Dataset, directory: Path) -> Path:
    """Write conversations as `data.jsonl` with PNG files beside it; returns the JSON Lines file."""
    (directory / "images").mkdir(parents=True, exist_ok=True)
    path = directory / "data.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(len(world)):
            row = world[index]
            messages = []
            for message in row.messages:
                names = []
                for i, image in enumerate(message.get("images", ())):
                    names.append(f"images/{index:06d}-{i}.png")
                    image.save(directory / names[-1])
                messages.append({**message, "images": names} if names else {k: message[k] for k in ("role", "content")})
            file.write(json.dumps({"messages": messages, "type": row.types}, ensure_ascii=False) + "\n")
    return path

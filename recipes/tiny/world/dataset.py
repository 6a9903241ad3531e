"""Conversations about the synthetic world, as a data set and as files."""

import functools
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
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
    describe,
)
from recipes.tiny.world.scene import Picture, sample_picture, share_shape
from recipes.tiny.world.small_talk import small_talk
from recipes.tiny.world.two_pictures import ask_shared, ask_two

TAG = "<image_placeholder>"
KINDS = {"shapes": 40, "words": 28, "chart": 9, "mixed": 8, "two": 13, "talk": 2}
"""What conversations are about, and how often, in percent."""


ConversationSampler = Callable[[random.Random, int], tuple[list[Any], list[Turn]]]
"""(source of randomness, most questions) -> the pictures, which `draw` draws, and the questions of one conversation."""


class Conversations(Dataset):
    """`length` conversations from a sampler; number `index` depends on `seed` and `index` only.

    Args:
        sample: makes one conversation.
        length: how many.
        seed: another seed gives others of the same kind.
        turns: most questions in a conversation; with 1, there is one question, or one and its follow-up.
        system: replaces the processor's system prompt; None for the processor's own, empty for none.
    """

    def __init__(
        self, sample: ConversationSampler, length: int, seed: int = 0, turns: int = 6, system: str | None = None
    ):
        self.sample = sample
        self.length = length
        self.seed = seed
        self.turns = turns
        self.system = system

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> TrainingRow:
        """Conversation `index`, with its pictures drawn.

        Raises:
            IndexError: outside 0 to length - 1, which ends iteration.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"There is no conversation {index} in a world of {self.length}.")
        rng = self._rng(index)
        pictures, turns = self.sample(rng, self.turns)
        messages: list[dict[str, Any]] = []
        for i, turn in enumerate(turns):
            content, images = turn.question, []
            if i == 0 and pictures:
                content = _with_tags(turn.question, len(pictures), rng)
                images = [draw(picture) for picture in pictures]
            messages.append({"role": "User", "content": content, "images": images})
            messages.append({"role": "Assistant", "content": turn.answer})
        types = tuple(turn.type for turn in turns)
        return TrainingRow(messages, self.system, types, origin=f"world {self.seed}:{index}")

    def turns_of(self, index: int) -> list[Turn]:
        """The questions and answers of a conversation, without drawing its pictures."""
        return self.sample(self._rng(index), self.turns)[1]

    def length_of(self, index: int) -> int:
        """A conversation's approximate length in characters; a picture counts as text of as many tokens does."""
        pictures, turns = self.sample(self._rng(index), self.turns)
        return 250 * len(pictures) + sum(len(turn.question) + len(turn.answer) + 20 for turn in turns)

    def _rng(self, index: int) -> random.Random:
        return random.Random(f"{self.seed}/{index}")


def sample_conversation(
    rng: random.Random,
    turns: int,
    kinds: Mapping[str, float] = KINDS,
    more: Askers = (),
    more_of_two: Askers = (),
    alike: float = 0,
    sample: Callable[[random.Random, str], Picture] = sample_picture,
) -> tuple[list[Picture], list[Turn]]:
    """The pictures and the questions of a conversation of the synthetic world.

    Args:
        rng, turns: see `ConversationSampler`.
        kinds: what conversations are about, and how often, in percent.
        more, more_of_two: askers about one picture, or about two, besides the usual ones.
        alike: the fraction of pairs of pictures that are made to share a shape.
        sample: makes a picture of a kind.
    """
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    if kind == "talk":
        return [], [small_talk(rng) for _ in range(min(turns, rng.randint(1, 3)))]
    if kind == "two":
        pair = [
            rng.choice(("shapes", "shapes", "mixed")),
            rng.choice(("shapes", "shapes", "mixed", "words", "chart")),
        ]
        rng.shuffle(pair)
        pictures = [sample(rng, kind) for kind in pair]
        if alike and rng.random() < alike:
            pictures = share_shape(pictures, rng)
        questions = ask_two(pictures, rng, more_of_two)
    else:
        pictures = [sample(rng, kind)]
        questions = ask(pictures[0], kind, rng, more)
    return pictures, take_turns(questions, turns)


def take_turns(questions: Iterator[list[Turn]], turns: int) -> list[Turn]:
    """Up to `turns` questions whose answers all differ, and one more if the last has a follow-up."""
    asked: list[Turn] = []
    for new in itertools.islice(questions, 30):
        # A model would copy an answer that was given before instead of looking.
        if not {turn.answer for turn in new} & {turn.answer for turn in asked}:
            asked += new
        if len(asked) >= turns:
            break
    return asked


class SyntheticWorld(Conversations):
    """Conversations about everything that the world has; the arguments are those of `Conversations`."""

    def __init__(self, length: int, seed: int = 0, turns: int = 6):
        super().__init__(sample_conversation, length, seed, turns)


class HardQuestions(Conversations):
    """The same world, with more of the questions that are learnt last: counts, places, presence, which of two pictures.

    Cases that are rare by chance are made more frequent: several shapes of a kind, and shapes that two pictures share.
    The arguments are those of `Conversations`.
    """

    def __init__(self, length: int, seed: int = 0, turns: int = 6):
        sample = functools.partial(
            sample_conversation,
            kinds={"shapes": 39, "words": 25, "chart": 3, "mixed": 8, "two": 23, "talk": 2},
            more=((ask_place, 1), (ask_absent, 1), (ask_count, 1.5), (ask_repeated, 2.5)),
            more_of_two=((ask_shared, 2.5),),
            alike=0.4,
        )
        super().__init__(sample, length, seed, turns)


def sample_caption(rng: random.Random, turns: int = 1) -> tuple[list[Picture], list[Turn]]:
    """A picture and its description, as the answer to an empty question."""
    picture = sample_picture(rng, rng.choices(("shapes", "words", "chart"), (50, 40, 10))[0])
    return [picture], [replace(describe(picture, rng), question="")]


class Captions(Conversations):
    """Pictures with their descriptions, and nothing else in the prompt.

    A description names everything in a picture, so a model learns to see from it sooner than from questions. The
    arguments are those of `Conversations`.
    """

    def __init__(self, length: int, seed: int = 0):
        super().__init__(sample_caption, length, seed, system="")


class LengthGrouped(Dataset):
    """Conversations in an order that gives each batch conversations of similar length, to save padding.

    Within every `WINDOW` batches they are sorted by length; the batches then come in a random order.

    Args:
        conversations: those to order.
        batch_size: how many make a batch.
    """

    WINDOW = 16

    def __init__(self, conversations: Conversations, batch_size: int):
        self.conversations = conversations
        self.batch_size = batch_size
        self._start, self._order = -1, []

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> TrainingRow:
        """The conversation at place `index` of the order.

        Raises:
            IndexError: outside 0 to length - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"There is no conversation {index} in a world of {len(self)}.")
        window = self.WINDOW * self.batch_size
        start = index - index % window
        if start != self._start:
            indices = sorted(range(start, min(start + window, len(self))), key=self.conversations.length_of)
            batches = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
            random.Random(f"order {self.conversations.seed}/{start}").shuffle(batches)
            self._start, self._order = start, list(itertools.chain.from_iterable(batches))
        return self.conversations[self._order[index - start]]


def _with_tags(question: str, images: int, rng: random.Random) -> str:
    """The question with its image tags before or after it, as people write them."""
    tags = TAG * images
    return rng.choice(
        (f"{tags}{question}", f"{tags}{question}", f"{tags}\n{question}", f"{tags} {question}", f"{question}{tags}")
    )


def write_conversations(conversations: Dataset, directory: Path) -> Path:
    """Write conversations as `data.jsonl` with PNG files beside it; returns the JSON Lines file."""
    (directory / "images").mkdir(parents=True, exist_ok=True)
    path = directory / "data.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(len(conversations)):
            row = conversations[index]
            messages = []
            for message in row.messages:
                names = []
                for i, image in enumerate(message.get("images", ())):
                    names.append(f"images/{index:06d}-{i}.png")
                    image.save(directory / names[-1])
                messages.append({**message, "images": names} if names else {k: message[k] for k in ("role", "content")})
            file.write(json.dumps({"messages": messages, "type": row.types}, ensure_ascii=False) + "\n")
    return path

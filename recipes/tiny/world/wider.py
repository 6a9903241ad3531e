"""The wider world: the synthetic one in many wordings and styles of drawing, and pictures of other things."""

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from recipes.tiny.world.dataset import Conversations, sample_conversation, take_turns
from recipes.tiny.world.elsewhere import SOMETHING_ELSE, Elsewhere
from recipes.tiny.world.paint import sample_painted
from recipes.tiny.world.questions import (
    Askers,
    Turn,
    ask,
    ask_absent,
    ask_count,
    ask_place,
    ask_repeated,
    place,
    unique_shapes,
)
from recipes.tiny.world.samples import KIND_OF_SAMPLE, SAMPLES
from recipes.tiny.world.scene import Picture, sample_picture
from recipes.tiny.world.two_pictures import ask_shared, ask_two
from recipes.tiny.world.wider_questions import (
    ask_background,
    ask_beside,
    ask_beside_absent,
    ask_list,
    ask_mixed,
    ask_order,
    ask_total,
    ask_unknown_thing,
    ask_word_colour,
)
from recipes.tiny.world.wordings import mistype, reword

ELSEWHERE = 0.12
"""The fraction of conversations that are about pictures of other things."""

ABOUT_SAMPLES = 0.06
"""The fraction of the others that are about this repository's sample pictures, which users see first."""

PAINTED = 0.3
"""The fraction of the world's pictures that `paint` draws, in other styles."""

REWORDED = 0.5
"""The fraction of questions that are reworded."""

KINDS = {"shapes": 35, "words": 30, "chart": 11, "mixed": 8, "two": 14, "talk": 2}
"""What the world's conversations are about, and how often, in percent."""

MORE: Askers = (
    (ask_place, 0.7), (ask_absent, 0.7), (ask_count, 4), (ask_repeated, 1.5), (ask_list, 1), (ask_beside, 3),
    (ask_beside_absent, 0.15), (ask_total, 1.2), (ask_unknown_thing, 0.7), (ask_background, 0.6), (ask_order, 2.5),
    (ask_word_colour, 0.7), (ask_mixed, 1),
)  # fmt: skip
"""Askers besides the usual ones."""

ABOUT_PHOTOGRAPHS = (
    "What is this?", "Who is this?", "What animal is this?", "Where is this?", "Where was this taken?",
    "What do you see in this photo?", "Describe the photo.", "Is this a photo?", "What is the person doing?",
    "What is in the foreground?", "What time of day is it?", "How is the weather in the picture?", "What breed is it?",
    "Is it day or night?", "How many people are there?", "What is happening here?", "Is this a dog or a cat?",
)  # fmt: skip
"""Questions that are asked only about pictures of other things."""


def sample_wider_picture(rng: random.Random, kind: str) -> Picture:
    """A picture of the world, of a kind; sometimes in another style."""
    return sample_painted(rng, kind) if rng.random() < PAINTED else sample_picture(rng, kind)


def sample_elsewhere(
    rng: random.Random, turns: int, photographs: tuple[Path, ...] = ()
) -> tuple[list[Elsewhere], list[Turn]]:
    """A picture of something else, seldom two, with questions of all kinds that have the same answer.

    Args:
        rng, turns: see `ConversationSampler`.
        photographs: see `Elsewhere`.
    """
    pictures = [Elsewhere(rng.getrandbits(32), photographs) for _ in range(rng.choices((1, 2), (95, 5))[0])]
    if rng.random() < 0.15:
        return pictures, [Turn(mistype(rng.choice(ABOUT_PHOTOGRAPHS).rstrip("?."), rng), SOMETHING_ELSE, "elsewhere")]
    # The questions are those about some picture of the world, so that they do not reveal the answer.
    kind = rng.choices(("shapes", "words", "chart", "mixed"), (50, 20, 15, 15))[0]
    asked = itertools.chain.from_iterable(ask(sample_picture(rng, kind), kind, rng, MORE))
    wanted = min(turns, rng.choice((1, 1, 2, 2, 3)))
    return pictures, [
        replace(turn, answer=SOMETHING_ELSE, type="elsewhere") for turn in itertools.islice(asked, wanted)
    ]


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
        if (shapes := unique_shapes(pictures[0])) and rng.random() < 0.15:  # `MORE` leaves out what is near a border
            shape = rng.choice(shapes)
            turn = Turn(f"Where is the {shape.kind}?", f"The {shape.kind} is {place(pictures[0], shape)}.", "place")
            questions = itertools.chain([[turn]], questions)
    return pictures, reword_some(take_turns(questions, turns), rng)


def sample_wider(
    rng: random.Random, turns: int, photographs: tuple[Path, ...] = (), elsewhere: float = ELSEWHERE
) -> tuple[list[Picture | Elsewhere], list[Turn]]:
    """The pictures and the questions of a conversation of the wider world.

    Args:
        rng, turns: see `ConversationSampler`.
        photographs: see `Elsewhere`.
        elsewhere: the fraction of conversations that are about pictures of other things.
    """
    if rng.random() < elsewhere:
        pictures, asked = sample_elsewhere(rng, turns, photographs)
    elif rng.random() < ABOUT_SAMPLES:
        return sample_about_samples(rng, turns)
    else:
        pictures, asked = sample_conversation(
            rng, turns, KINDS, MORE, ((ask_shared, 2.5),), alike=0.4, sample=sample_wider_picture
        )
    return pictures, reword_some(asked, rng)


def reword_some(turns: Sequence[Turn], rng: random.Random) -> list[Turn]:
    """The turns, with a fraction `REWORDED` of the questions reworded."""
    return [replace(turn, question=reword(turn.question, rng)) if rng.random() < REWORDED else turn for turn in turns]


class WiderConversations(Conversations):
    """Conversations of the wider world, for the last stage of training.

    Args:
        length, seed, turns: see `Conversations`.
        photographs: files, always in the same order; half of the pictures of other things are parts of them.
        elsewhere: the fraction of conversations that are about pictures of other things.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        turns: int = 6,
        photographs: Sequence[Path] = (),
        elsewhere: float = ELSEWHERE,
    ):
        sample = functools.partial(sample_wider, photographs=tuple(photographs), elsewhere=elsewhere)
        super().__init__(sample, length, seed, turns)

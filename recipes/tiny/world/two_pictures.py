"""Questions about two pictures: about one of them, or which of them it is."""

import random
from collections.abc import Callable, Iterator, Sequence

from recipes.tiny.world.questions import (
    Askers,
    Turn,
    article,
    ask_colour,
    ask_count,
    ask_shape,
    ask_tallest,
    ask_text,
    worded,
)
from recipes.tiny.world.scene import COLOURS, SHAPES, Picture, Shape

ORDINALS = ("first", "second")


def ask_two(pictures: Sequence[Picture], rng: random.Random, more: Askers = ()) -> Iterator[list[Turn]]:
    """Questions without end about one of two pictures, or which of them it is.

    Args:
        more: askers besides `ask_which` and `ask_one_of`.
    """
    askers, weights = zip((ask_which, 6), (ask_one_of, 4), *more, strict=True)
    while True:
        turn = rng.choices(askers, weights)[0](pictures, rng)
        if turn is not None:
            yield [turn]


def ask_one_of(pictures: Sequence[Picture], rng: random.Random) -> Turn | None:
    """A question about one of two pictures, by its number."""
    number = rng.randrange(2)
    picture, ordinal = pictures[number], ORDINALS[number]
    asker = rng.choice((ask_colour, ask_count, ask_shape, ask_text, ask_tallest))
    turn = asker(picture, rng)
    if turn is None:
        return None
    question = turn.question.rstrip("?.")
    for phrase in (" in the picture", " in the image"):
        question = question.replace(phrase, "")
    if question.endswith(("is this", "the picture say", "written here")):
        return None
    ending = rng.choice((f" in the {ordinal} image", f" in the {ordinal} picture"))
    mark = turn.question[-1] if turn.question[-1] in "?." else "?"
    return Turn(f"{question}{ending}{mark}", turn.answer, "two images")


NAMES: tuple[Callable[[Shape], str], ...] = (
    lambda shape: f"{shape.colour} {shape.kind}",
    lambda shape: f"{shape.colour} {shape.kind}",
    lambda shape: shape.kind,
)
"""How a shape is named in questions about which of two pictures has it."""


def ask_which(pictures: Sequence[Picture], rng: random.Random) -> Turn:
    """Which of two pictures has a shape; sometimes it is both, or neither."""
    shapes = [shape for picture in pictures for shape in picture.shapes]
    name = rng.choice(NAMES)
    if rng.random() < 0.12 or not shapes:
        wanted = f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}"
        name = NAMES[0]
    else:
        wanted = name(rng.choice(shapes))
    return _which(pictures, name, wanted, rng)


def ask_shared(pictures: Sequence[Picture], rng: random.Random) -> Turn | None:
    """Which of two pictures has a shape that both have."""
    name = rng.choice(NAMES)
    shared = set.intersection(*({name(shape) for shape in picture.shapes} for picture in pictures))
    return _which(pictures, name, rng.choice(sorted(shared)), rng) if shared else None


def _which(pictures: Sequence[Picture], name: Callable[[Shape], str], wanted: str, rng: random.Random) -> Turn:
    """The question which of two pictures has a shape that `name` calls `wanted`."""
    has = [any(name(shape) == wanted for shape in picture.shapes) for picture in pictures]
    if all(has):
        answer = f"Both images have {article(wanted)}."
    elif not any(has):
        answer = f"Neither image has {article(wanted)}."
    else:
        answer = f"The {ORDINALS[has.index(True)]} image has the {wanted}."
    question = worded(
        rng,
        f"Which image has the {wanted}?",
        f"Which picture has the {wanted}?",
        f"Which image shows the {wanted}?",
        f"In which image is the {wanted}?",
        f"Which of the two images has {article(wanted)}?",
        f"Which image contains {article(wanted)}?",
    )
    return Turn(question, answer, "two images")

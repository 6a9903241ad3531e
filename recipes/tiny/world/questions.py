"""Questions about pictures, in several wordings, each with its one right answer."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from recipes.tiny.world.scene import COLOURS, SHAPES, Picture, Shape

NUMBERS = ("no", "one", "two", "three", "four", "five")


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and the question's type.

    `topic` is what a follow-up can refer to: the shape asked about, or the picture's words or chart.
    """

    question: str
    answer: str
    type: str
    topic: Shape | str | None = None


def plural(noun: str) -> str:
    """The plural of a shape's name."""
    return f"{noun}es" if noun.endswith("ss") else f"{noun}s"


def count_phrase(count: int, noun: str) -> str:
    """`one star`, `three stars`."""
    return f"{NUMBERS[count]} {noun if count == 1 else plural(noun)}"


def article(words: str) -> str:
    """The words with `a` or `an` in front."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def place(picture: Picture, shape: Shape) -> str:
    """Where a shape is, by thirds of the picture: `at the top left`, `on the right`, `in the centre`."""
    column = ("left", "", "right")[min(2, int(3 * shape.x / picture.width))]
    row = ("top", "", "bottom")[min(2, int(3 * shape.y / picture.height))]
    if row:
        return f"at the {row} {column}".rstrip()
    return f"on the {column}" if column else "in the centre"


def is_clearly_placed(picture: Picture, shape: Shape) -> bool:
    """Whether a shape's centre is not on the border between two thirds."""
    parts = (shape.x / picture.width, shape.y / picture.height)
    return all(abs(part - border) > 0.035 for part in parts for border in (1 / 3, 2 / 3))


def worded(rng: random.Random, *wordings: str) -> str:
    """One wording, at times written carelessly."""
    question = rng.choice(wordings)
    if "colour" in question and rng.random() < 0.4:
        question = question.replace("colour", "color")
    if rng.random() < 0.12:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.08:
        question = question.rstrip("?.")
    return question


# --- shapes ---


def unique_shapes(picture: Picture) -> list[Shape]:
    """Shapes whose kind occurs once."""
    kinds = Counter(shape.kind for shape in picture.shapes)
    return [shape for shape in picture.shapes if kinds[shape.kind] == 1]


def unique_colours(picture: Picture) -> list[Shape]:
    """Shapes whose colour occurs once."""
    colours = Counter(shape.colour for shape in picture.shapes)
    return [shape for shape in picture.shapes if colours[shape.colour] == 1]


def ask_colour(picture: Picture, rng: random.Random) -> Turn | None:
    """What colour a shape is."""
    if not (candidates := unique_shapes(picture)):
        return None
    shape = rng.choice(candidates)
    question = worded(
        rng,
        f"What colour is the {shape.kind}?",
        f"What is the colour of the {shape.kind}?",
        f"Which colour is the {shape.kind}?",
        f"Which colour does the {shape.kind} have?",
        f"Tell me the colour of the {shape.kind}.",
    )
    return Turn(question, f"The {shape.kind} is {shape.colour}.", "colour", shape)


def ask_shape(picture: Picture, rng: random.Random) -> Turn | None:
    """What shape has a given colour."""
    if not (candidates := unique_colours(picture)):
        return None
    shape = rng.choice(candidates)
    question = worded(
        rng,
        f"What is the {shape.colour} shape?",
        f"What shape is {shape.colour}?",
        f"Which shape is {shape.colour}?",
        f"What shape is the {shape.colour} one?",
        f"What shape is the {shape.colour} thing?",
    )
    return Turn(question, f"The {shape.colour} shape is {article(shape.kind)}.", "shape", shape)


def ask_place(picture: Picture, rng: random.Random) -> Turn | None:
    """Where a shape is."""
    candidates = [
        (shape, name)
        for shapes, name in (
            (unique_shapes(picture), lambda shape: shape.kind),
            (unique_colours(picture), lambda shape: f"{shape.colour} shape"),
            (unique_shapes(picture), lambda shape: f"{shape.colour} {shape.kind}"),
        )
        for shape in shapes
        if is_clearly_placed(picture, shape)
    ]
    if not candidates:
        return None
    shape, name = rng.choice(candidates)
    question = worded(
        rng,
        f"Where is the {name(shape)}?",
        f"Where is the {name(shape)} in the picture?",
        f"Where is the {name(shape)} in the image?",
        f"Where can I find the {name(shape)}?",
    )
    return Turn(question, f"The {name(shape)} is {place(picture, shape)}.", "place", shape)


def ask_count(picture: Picture, rng: random.Random) -> Turn | None:
    """How many shapes there are, of all, of a colour, of a kind, or of both."""
    if not picture.shapes:
        return None
    return _count(rng, *rng.choice(_counts(picture, rng.choice(picture.shapes))))


def ask_repeated(picture: Picture, rng: random.Random) -> Turn | None:
    """How many there are of something that occurs more than once."""
    repeated = [(noun, count) for shape in picture.shapes for noun, count in _counts(picture, shape)[1:] if count > 1]
    return _count(rng, *rng.choice(repeated)) if repeated else None


def _counts(picture: Picture, shape: Shape) -> tuple[tuple[str, int], ...]:
    """(noun, number of such shapes in the picture) for each noun that a shape can be counted under."""
    return (
        ("shape", len(picture.shapes)),
        (f"{shape.colour} shape", sum(other.colour == shape.colour for other in picture.shapes)),
        (shape.kind, sum(other.kind == shape.kind for other in picture.shapes)),
        (
            f"{shape.colour} {shape.kind}",
            sum((other.colour, other.kind) == (shape.colour, shape.kind) for other in picture.shapes),
        ),
    )


def _count(rng: random.Random, noun: str, count: int) -> Turn:
    return Turn(
        how_many_question(rng, noun), f"There {'is' if count == 1 else 'are'} {count_phrase(count, noun)}.", "count"
    )


def how_many_question(rng: random.Random, noun: str) -> str:
    """How many of a thing there are, in one of several wordings."""
    return worded(
        rng,
        f"How many {plural(noun)} are there?",
        f"How many {plural(noun)} are in the picture?",
        f"How many {plural(noun)} do you see?",
        f"How many {plural(noun)} can you see in the image?",
        f"Count the {plural(noun)}.",
    )


def ask_is_there(picture: Picture, rng: random.Random) -> Turn | None:
    """Whether there is a shape that the picture has."""
    if not picture.shapes:
        return None
    shape = rng.choice(picture.shapes)
    name = rng.choice((shape.kind, f"{shape.colour} shape", f"{shape.colour} {shape.kind}"))
    return Turn(is_there_question(rng, name), f"Yes, there is {article(name)}.", "presence")


def is_there_question(rng: random.Random, name: str) -> str:
    """Whether there is a thing, in one of several wordings."""
    return worded(
        rng,
        f"Is there {article(name)}?",
        f"Is there {article(name)} in the picture?",
        f"Is there {article(name)} in the image?",
        f"Do you see {article(name)}?",
        f"Can you see {article(name)}?",
    )


# --- words and charts ---


def ask_text(picture: Picture, rng: random.Random) -> Turn | None:
    """What one word says, or all words."""
    if not picture.words:
        return None
    if len(picture.words) > 1 and rng.random() < 0.75:
        word = rng.choice(picture.words)
        question = worded(
            rng,
            f"What does the {word.colour} text say?",
            f"What does the {word.colour} word say?",
            f"Read the {word.colour} text.",
            f"What is written in {word.colour}?",
        )
        return Turn(question, f'It says "{word.text}".', "reading")
    question = worded(
        rng,
        "What does it say?",
        "What does the text say?",
        "What is written in the picture?",
        "What is written here?",
        "What does the picture say?",
        "Read the text.",
        *(
            ()
            if len(picture.words) > 1
            else ("What number is this?",)
            if picture.words[0].text.isdigit()
            else ("What word is this?", "Which word is this?")
        ),
    )
    texts = [f'"{word.text}"' for word in picture.words]
    if len(texts) == 1:
        return Turn(question, f"It says {texts[0]}.", "reading", "word")
    return Turn(question, f"It says {join(texts)}.", "reading several")


def join(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def ask_tallest(picture: Picture, rng: random.Random) -> Turn | None:
    """Which bar is the tallest, or the shortest."""
    if not picture.chart:
        return None
    which = rng.choice(("tallest", "tallest", "tallest", "shortest"))
    colour = picture.chart.bar(which)
    other = {"tallest": ("highest", "biggest"), "shortest": ("lowest", "smallest")}[which]
    question = worded(
        rng,
        f"Which bar is the {which}?",
        f"Which bar is {which}?",
        f"Which bar is the {rng.choice(other)}?",
        f"What colour is the {which} bar?",
        f"Which colour has the {which} bar?",
    )
    return Turn(question, f"The {colour} bar is the {which}.", which, which)


def ask_bars(picture: Picture, rng: random.Random) -> Turn | None:
    """How many bars there are."""
    if not picture.chart:
        return None
    return Turn(how_many_question(rng, "bar"), f"There are {count_phrase(len(picture.chart.values), 'bar')}.", "count")


# --- everything ---


def describe(picture: Picture, rng: random.Random) -> Turn:
    """Describe the whole picture; shapes come from left to right."""
    question = worded(
        rng,
        "Describe the image.",
        "Describe the picture.",
        "Describe this image.",
        "What is in the picture?",
        "What do you see?",
        "What can you see in the image?",
        "What does the picture show?",
    )
    sentences = []
    if picture.shapes:
        ordered = sorted(picture.shapes, key=lambda shape: shape.x)
        names = [f"{article(f'{shape.colour} {shape.kind}')} {place(picture, shape)}" for shape in ordered]
        sentences.append(f"The picture shows {join(names)}.")
    if picture.words:
        texts = [f'"{word.text}"' for word in picture.words]
        sentences.append(f"It says {join(texts)}.")
    if picture.chart:
        names = list(picture.chart.colours)
        sentences.append(f"The picture shows a bar chart with {count_phrase(len(names), 'bar')}: {join(names)}.")
        sentences.append(f"The {picture.chart.bar('tallest')} bar is the tallest.")
    return Turn(question, " ".join(sentences), "description")


def mixed_names(picture: Picture) -> list[str]:
    """`red square` and the like, of kinds and colours that both occur, but not together: the hardest to deny."""
    pairs = {(shape.colour, shape.kind) for shape in picture.shapes}
    colours, kinds = (sorted({pair[i] for pair in pairs}) for i in (0, 1))
    return [f"{colour} {kind}" for colour in colours for kind in kinds if (colour, kind) not in pairs]


def ask_absent(picture: Picture, rng: random.Random) -> Turn:
    """A question about something that is not in the picture."""
    kinds = {shape.kind for shape in picture.shapes}
    colours = {shape.colour for shape in picture.shapes}
    kind = rng.choice([kind for kind in SHAPES if kind not in kinds])
    colour = rng.choice([colour for colour in COLOURS if colour not in colours])
    mixed = mixed_names(picture)
    pair = rng.choice(mixed) if mixed and rng.random() < 0.5 else f"{colour} {kind}"
    name = rng.choice((kind, f"{colour} shape", pair))
    options = [
        (is_there_question(rng, name), f"No, there is no {name} in the picture."),
        (is_there_question(rng, name), f"No, there is no {name} in the picture."),
        (how_many_question(rng, name), f"There are no {plural(name)} in the picture."),
        (worded(rng, f"What colour is the {kind}?", f"What is the colour of the {kind}?"), there_is_no(kind)),
        (worded(rng, f"Where is the {name}?", f"Where can I find the {name}?"), there_is_no(name)),
        (worded(rng, f"What is the {colour} shape?", f"What shape is {colour}?"), there_is_no(f"{colour} shape")),
    ]
    if not picture.words and not picture.labelled:
        question = worded(
            rng, "What does it say?", "What does the text say?", "Read the text.", "What is written here?"
        )
        options.append((question, there_is_no("text")))
    if not picture.chart:
        question = worded(rng, "Which bar is the tallest?", "Which bar is the shortest?", "Which bar is tallest?")
        options.append((question, there_is_no("bar chart")))
    return Turn(*rng.choice(options), "absence")


def there_is_no(name: str) -> str:
    """The answer to a question about something that is not there."""
    return f"There is no {name} in the picture."


def follow_up(picture: Picture, turn: Turn, rng: random.Random) -> Turn | None:
    """A question that can only be understood after `turn`."""
    topic = turn.topic
    if topic in ("tallest", "shortest"):
        which = "shortest" if topic == "tallest" else "tallest"
        colour = picture.chart.bar(which)
        question = worded(rng, f"And the {which}?", f"And which is the {which}?", f"What about the {which}?")
        return Turn(question, f"The {colour} bar is the {which}.", "follow-up")
    if topic == "word":
        word = picture.words[0]
        question = worded(rng, "What colour is it?", "And what colour is it?", "Which colour is it?")
        return Turn(question, f"It is {word.colour}.", "follow-up")
    if not isinstance(topic, Shape):
        return None
    options = []
    if turn.type != "colour" and "colour" not in turn.question and topic.colour not in turn.question:
        question = worded(rng, "What colour is it?", "And what colour is it?", "And its colour?", "Which colour is it?")
        options.append((question, f"It is {topic.colour}."))
    if turn.type != "shape" and topic.kind not in turn.question:
        question = worded(rng, "What shape is it?", "And what shape is it?", "And its shape?")
        options.append((question, f"It is {article(topic.kind)}."))
    if turn.type != "place" and is_clearly_placed(picture, topic):
        question = worded(rng, "Where is it?", "And where is it?", "And where is that?", "Where is it in the picture?")
        options.append((question, f"It is {place(picture, topic)}."))
    others = [shape for shape in unique_shapes(picture) if shape.kind != topic.kind]
    if others and turn.type == "colour":
        other = rng.choice(others)
        question = worded(
            rng, f"And the {other.kind}?", f"What about the {other.kind}?", f"And what about the {other.kind}?"
        )
        options.append((question, f"The {other.kind} is {other.colour}."))
    return Turn(*rng.choice(options), "follow-up") if options else None


Askers = Sequence[tuple[Callable[..., Turn | None], float]]
"""Pairs of a function that asks a question about a picture (None if it cannot), and the weight of choosing it."""

ASKERS: dict[str, Askers] = {
    "shapes": (
        (ask_colour, 2), (ask_shape, 2), (ask_place, 2), (ask_count, 2.5), (ask_is_there, 1), (ask_absent, 2),
        (describe, 1),
    ),
    "words": ((ask_text, 5), (ask_absent, 1), (describe, 0.5)),
    "chart": ((ask_tallest, 4), (ask_bars, 1), (ask_absent, 1), (describe, 1)),
    "mixed": (
        (ask_text, 3), (ask_colour, 1), (ask_shape, 1), (ask_place, 1), (ask_count, 1), (ask_is_there, 0.5),
        (ask_absent, 1), (describe, 0.7),
    ),
}  # fmt: skip
"""What is asked about each kind of picture, and how often."""


def ask(picture: Picture, kind: str, rng: random.Random, more: Askers = ()) -> Iterator[list[Turn]]:
    """Questions about one picture without end: each alone, or with a follow-up.

    Args:
        more: askers besides `ASKERS`.
    """
    askers, weights = zip(*ASKERS[kind], *more, strict=True)
    while True:
        turn = rng.choices(askers, weights)[0](picture, rng)
        if turn is None:
            continue
        second = follow_up(picture, turn, rng) if rng.random() < 0.45 else None
        yield [turn, second] if second else [turn]

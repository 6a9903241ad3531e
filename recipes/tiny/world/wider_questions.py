"""Further questions: lists, what is beside what, backgrounds, the order of bars, and things that no picture has."""

import colorsys
import itertools
import random
from collections.abc import Callable, Sequence

from recipes.tiny.world.questions import (
    Turn,
    article,
    count_phrase,
    how_many_question,
    is_there_question,
    join,
    mixed_names,
    plural,
    there_is_no,
    unique_colours,
    unique_shapes,
    worded,
)
from recipes.tiny.world.scene import RGB, SHAPES, Picture, Shape

UNKNOWN_THINGS = (  # noqa: SIM905  as a list it would be a page long
    "dog cat car house tree person man woman child baby bird horse cow fish flower boat bus bicycle train plane truck "
    "chair table bottle cup banana apple pizza cake book phone computer clock door window bed sofa lamp hat shoe shirt "
    "bag umbrella lion tiger bear zebra sheep mouse snake spider butterfly guitar piano keyboard camera knife fork "
    "robot girl boy cloud road wall face hand"
).split()
"""Things that people ask about and no picture has."""

NOT_THERE = "That is not in the picture."
"""The answer to questions about such things. It does not name them: a small model cannot repeat words that it has not
been trained on."""

UNSEEN_THINGS = (  # noqa: SIM905
    "elephant giraffe monkey rabbit frog penguin dinosaur rocket bridge ladder candle hammer spoon castle helicopter "
    "laptop television mountain sandwich moon"
).split()
"""Further such things, which no conversation for training names."""

PLURALS = {
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "baby": "babies",
    "mouse": "mice",
    "knife": "knives",
    "fish": "fish",
    "sheep": "sheep",
    "butterfly": "butterflies",
    "bus": "buses",
    "sandwich": "sandwiches",
}
"""Plurals of the things that do not just add an s."""

APART = 0.08
"""How far centres must differ, as a fraction of the picture's side, for one shape to be clearly beside another."""

RELATIONS: dict[str, Callable[[Shape, Shape, Picture], float]] = {
    "left of": lambda shape, other, picture: (other.x - shape.x) / picture.width,
    "right of": lambda shape, other, picture: (shape.x - other.x) / picture.width,
    "above": lambda shape, other, picture: (other.y - shape.y) / picture.height,
    "below": lambda shape, other, picture: (shape.y - other.y) / picture.height,
}
"""How far a shape is left of, right of, above or below another, as a fraction of the picture's side."""

LEAST_STEP = 0.05
"""How much bars must differ, as a fraction of the chart's height, for their order to be clear."""


def ask_list(picture: Picture, rng: random.Random) -> Turn | None:
    """Which shapes there are, listed from left to right."""
    if not picture.shapes:
        return None
    nouns = ("shapes",) if picture.words else ("shapes", "shapes", "objects", "things")
    noun = rng.choice(nouns)
    question = worded(
        rng,
        f"List all {noun}.",
        f"List the {noun}.",
        f"Name all the {noun}.",
        f"Which {noun} are there?",
        f"What {noun} are in the picture?",
        f"What {noun} do you see?",
    )
    names = [f"{shape.colour} {shape.kind}" for shape in sorted(picture.shapes, key=lambda shape: shape.x)]
    verb = "is" if len(names) == 1 else "are"
    return Turn(question, f"There {verb} {join([article(name) for name in names])}.", "list")


def ask_total(picture: Picture, rng: random.Random) -> Turn | None:
    """How many shapes there are, whatever they are called."""
    if picture.chart or not picture.shapes:
        return None
    noun = rng.choice(("shapes",) if picture.words else ("shapes", "objects", "things"))
    question = worded(
        rng,
        f"How many {noun} are there in total?",
        f"How many {noun} are there altogether?",
        f"How many {noun} are there?",
        f"What is the total number of {noun}?",
        f"How many {noun} does the picture show?",
    )
    count = len(picture.shapes)
    return Turn(question, f"There {'is' if count == 1 else 'are'} {count_phrase(count, 'shape')}.", "count")


def beside(picture: Picture, reference: Shape, relation: str) -> list[Shape] | None:
    """The shapes on one side of another, in order; None if that is not clear for each of the others."""
    parts = {
        shape: RELATIONS[relation](shape, reference, picture) for shape in picture.shapes if shape is not reference
    }
    if any(abs(part) < APART for part in parts.values()):
        return None
    vertical = relation in ("above", "below")
    return sorted(
        (shape for shape, part in parts.items() if part > 0), key=lambda shape: shape.y if vertical else shape.x
    )


def ask_beside(picture: Picture, rng: random.Random) -> Turn | None:
    """What is left of, right of, above or below a shape."""
    if picture.words or len(picture.shapes) < 2:
        return None
    named = [
        *((shape, shape.kind) for shape in unique_shapes(picture)),
        *((shape, f"{shape.colour} {shape.kind}") for shape in unique_shapes(picture)),
        *((shape, f"{shape.colour} shape") for shape in unique_colours(picture)),
    ]
    clear = [
        (name, relation, found)
        for shape, name in named
        for relation in RELATIONS
        if (found := beside(picture, shape, relation)) is not None
    ]
    # Sides with nothing on them, which every outermost shape has, are asked about more rarely.
    full = [item for item in clear if item[2]]
    if not clear:
        return None
    name, relation, found = rng.choice(full if full and rng.random() < 0.6 else clear)
    where = rng.choice({"left of": ("left of", "to the left of", "on the left of"),
                        "right of": ("right of", "to the right of", "on the right of"),
                        "above": ("above",), "below": ("below", "under")}[relation])  # fmt: skip
    question = worded(
        rng,
        f"What is {where} the {name}?",
        f"Which shapes are {where} the {name}?",
        f"What do you see {where} the {name}?",
    )
    return Turn(question, f"{_sentence_start(found)} {relation} the {name}.", "beside")


def _sentence_start(found: list[Shape]) -> str:
    """`Nothing is`, `A red star is`, `A red circle and a blue star are`."""
    if not found:
        return "Nothing is"
    text = join([article(f"{shape.colour} {shape.kind}") for shape in found])
    return f"{text[0].upper()}{text[1:]} {'is' if len(found) == 1 else 'are'}"


def plural_of_thing(thing: str) -> str:
    """The plural of one of the things that no picture has."""
    return PLURALS.get(thing, plural(thing))


def ask_unknown_thing(picture: Picture, rng: random.Random, things: Sequence[str] = UNKNOWN_THINGS) -> Turn:
    """A question about a thing that no picture has.

    Args:
        things: those to choose from.
    """
    said = {word.text.lower() for word in picture.words}
    thing = rng.choice([thing for thing in things if thing not in said])
    no = "No, that is not in the picture."
    options = (
        (is_there_question(rng, thing), no),
        (is_there_question(rng, thing), no),
        (
            how_many_question(rng, thing).replace(plural(thing), plural_of_thing(thing)),
            "There are none in the picture.",
        ),
        (worded(rng, f"Where is the {thing}?", f"Where can I find the {thing}?"), NOT_THERE),
        (worded(rng, f"What colour is the {thing}?", f"What is the colour of the {thing}?"), NOT_THERE),
        (worded(rng, f"What is {rng.choice(list(RELATIONS))} the {thing}?"), NOT_THERE),
    )
    return Turn(*rng.choice(options), "unknown thing")


def ask_beside_absent(picture: Picture, rng: random.Random) -> Turn | None:
    """What is beside a shape that is not there."""
    absent = [kind for kind in SHAPES if kind not in {shape.kind for shape in picture.shapes}]
    if picture.words or not picture.shapes or not absent:
        return None
    kind, relation = rng.choice(absent), rng.choice(list(RELATIONS))
    return Turn(worded(rng, f"What is {relation} the {kind}?"), there_is_no(kind), "absence")


HUES = {
    "red": ((0, 12), (345, 360)),
    "orange": ((22, 42),),
    "yellow": ((48, 66),),
    "green": ((85, 160),),
    "blue": ((195, 255),),
    "purple": ((268, 315),),
}
"""Ranges of hue, in degrees, that everyone would call by this name."""


def name_of_tone(tone: RGB) -> str | None:
    """`white`, `black`, `grey`, `red`, `light blue`, `dark green`; None for a tone that people call differently."""
    low, high = min(tone), max(tone)
    chroma = high - low
    if chroma <= 16:
        if low >= 228:
            return "white"
        if high <= 40:
            return "black"
        if low >= 75 and high <= 180:
            return "grey"
        return "light grey" if low >= 190 and high <= 222 else None
    hue = 360 * colorsys.rgb_to_hsv(*tone)[0]
    name = next((name for name, parts in HUES.items() if any(a <= hue <= b for a, b in parts)), None)
    if name is None:
        return None
    if high <= 100:
        return f"dark {name}" if chroma >= 25 and name in ("red", "green", "blue", "purple") else None
    if low >= 165:
        light = {"red": "pink", "yellow": "light yellow", "green": "light green", "blue": "light blue",
                 "purple": "light purple"}  # fmt: skip
        return light.get(name) if chroma >= 20 else None
    return name if chroma >= 110 else None


def ask_background(picture: Picture, rng: random.Random) -> Turn | None:
    """What colour the background is."""
    names = {name_of_tone(tone) for tone in picture.behind}
    if len(names) > 1 or None in names:
        return None
    question = worded(
        rng,
        "What colour is the background?",
        "What is the background colour?",
        "What is the colour of the background?",
        "Which colour does the background have?",
        "What colour is the background of the picture?",
    )
    return Turn(question, f"The background is {names.pop()}.", "background")


def ask_mixed(picture: Picture, rng: random.Random) -> Turn | None:
    """A question about a kind and a colour that both occur, but not together."""
    if not (mixed := mixed_names(picture)):
        return None
    name = rng.choice(mixed)
    if rng.random() < 0.3:
        return Turn(is_there_question(rng, name), f"No, there is no {name} in the picture.", "absence")
    return Turn(how_many_question(rng, name), f"There are no {plural(name)} in the picture.", "absence")


def ask_word_colour(picture: Picture, rng: random.Random) -> Turn | None:
    """What colour the only word is."""
    if len(picture.words) != 1:
        return None
    (word,) = picture.words
    noun = rng.choice(("word", "text") if word.text.isalpha() else ("number", "text"))
    question = worded(rng, f"What colour is the {noun}?", f"What is the colour of the {noun}?")
    return Turn(question, f"The {noun} is {word.colour}.", "colour")


def ask_order(picture: Picture, rng: random.Random) -> Turn | None:
    """The bars by their height."""
    if not picture.chart:
        return None
    ordered = sorted(zip(picture.chart.values, picture.chart.colours, strict=True), reverse=True)
    if any(tall - short < LEAST_STEP for (tall, _), (short, _) in itertools.pairwise(ordered)):
        return None
    colours = [colour for _, colour in ordered]
    if rng.random() < 0.65:
        question = worded(
            rng,
            "Order the bars by height.",
            "Sort the bars by height.",
            "Order the bars from tallest to shortest.",
            "Sort the bars from the tallest to the shortest.",
            "List the bars from tallest to shortest.",
        )
        return Turn(question, f"From the tallest to the shortest: {join(colours)}.", "order")
    question = worded(
        rng,
        "Order the bars from shortest to tallest.",
        "Sort the bars from the shortest to the tallest.",
        "List the bars from shortest to tallest.",
    )
    return Turn(question, f"From the shortest to the tallest: {join(colours[::-1])}.", "order")

"""What is in a picture: coloured shapes, words and bar charts, sampled at random."""

import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

RGB = tuple[int, int, int]

COLOURS: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (220, 20, 40), (200, 30, 30)),
    "orange": ((255, 140, 0), (255, 165, 0), (245, 125, 20)),
    "yellow": ((255, 255, 0), (255, 220, 0), (240, 215, 40)),
    "green": ((0, 128, 0), (0, 180, 0), (50, 205, 50)),
    "blue": ((0, 0, 255), (30, 80, 220), (30, 120, 240)),
    "purple": ((128, 0, 128), (150, 50, 200), (110, 30, 160)),
    "black": ((0, 0, 0), (20, 20, 20), (35, 35, 35)),
    "white": ((255, 255, 255), (250, 250, 250), (240, 240, 240)),
}
"""Colour names and the tones that carry them."""

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart")

WORDS = (  # noqa: SIM905  as a list it would be a page long
    "able acid also apple arm army art away baby back bag ball band bank bed bee bell bike bird blue boat body "
    "book boot box boy brick bus cafe cake call camp car cat chair child city clock cloud coat code coin cold "
    "cook cow cup data day deep desk dog door down dress duck ear east egg eye face farm fast fire fish flag food "
    "foot fork fox free frog fruit game gate girl glass go gold good grass green hair hand hat head hello help "
    "home horse hot hotel house ice idea ink iron jam jazz jet job joy juice jump key king kite lake lamp leaf "
    "left lemon light lion love lunch map milk moon mouse music name neck new news night no nose ocean open owl "
    "page paper park party pen piano pizza plane plant play pool post queen quick quiz radio rain red rice ring "
    "river road robot rock roof room sale salt sand sea seed shell ship shoe shop snow sofa soup spoon sport star "
    "stone stop storm sugar sun table taxi tea team tent tiger time toast town toy train tree truck up vase video "
    "voice wall water wave way week wind wine wolf wood world yes zebra zero zoo"
).split()


@dataclass(frozen=True)
class Shape:
    """One coloured shape. Lengths are pixels, angles degrees; `x`, `y` is the centre.

    Attributes:
        kind: its name: one of `SHAPES`, or another name if there is an `outline`.
        radius: of the circle around it.
        outline: corners in the unit circle (y down) of a shape that is not among `SHAPES`.
    """

    kind: str
    colour: str
    tone: RGB
    x: float
    y: float
    radius: float
    angle: float
    outline: tuple[tuple[float, float], ...] | None = None


@dataclass(frozen=True)
class Word:
    """A word or number on one line, centred at `x`, `y`, at most `width` by `height` pixels before it is turned."""

    text: str
    colour: str
    tone: RGB
    x: float
    y: float
    width: float
    height: float
    angle: float
    font: int
    """Chooses the font, modulo the number of fonts."""
    card: RGB | None
    """Colour of the card it stands on."""


@dataclass(frozen=True)
class Chart:
    """A bar chart in the rectangle `box` (left, top, right, bottom); `values` are parts of its height."""

    colours: tuple[str, ...]
    tones: tuple[RGB, ...]
    values: tuple[float, ...]
    box: tuple[float, float, float, float]
    gap: float
    """The fraction of a bar's slot that is free."""
    grid: bool
    frame: bool
    ink: RGB

    def bar(self, which: str) -> str:
        """The colour of the `tallest` or of the `shortest` bar."""
        value = (max if which == "tallest" else min)(self.values)
        return self.colours[self.values.index(value)]


@dataclass(frozen=True)
class Picture:
    """A picture of `width` by `height` pixels."""

    width: int
    height: int
    background: tuple[RGB, RGB]
    """Two equal tones for a plain background, otherwise the ends of a gradient or the tones of a pattern."""
    pattern: str
    """`plain`, `gradient`, `checks`, `stripes` or `noise`."""
    seed: int
    """The seed of random details that no question is about."""
    shapes: tuple[Shape, ...] = field(default=())
    words: tuple[Word, ...] = field(default=())
    chart: Chart | None = None
    labelled: bool = False
    """Whether there is also text that no question is about, such as a chart's labels."""

    @property
    def behind(self) -> tuple[RGB, ...]:
        """The tones of most of the area behind the things."""
        return self.background


def sample_picture(rng: random.Random, kind: str) -> Picture:
    """A random picture of a kind: `shapes`, `words`, `page` (full of words), `chart`, `mixed` (shapes and one word)."""
    long_side = rng.randint(160, 420)
    short_side = round(long_side * rng.choice((1, 1, rng.uniform(0.6, 1), rng.uniform(0.6, 1))))
    width, height = rng.choice(((long_side, short_side), (short_side, long_side)))
    background, pattern, avoided = _sample_background(rng)
    shapes: tuple[Shape, ...] = ()
    words: tuple[Word, ...] = ()
    chart = None
    if kind == "words":
        words = _sample_words(rng, width, height, avoided)
    elif kind == "page":
        words = _sample_page(rng, width, height, avoided)
    elif kind == "chart":
        chart = _sample_chart(rng, width, height, background[0], avoided)
    elif kind == "shapes":
        shapes = _sample_shapes(rng, width, height, avoided, rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 5)))
    else:
        words = _sample_words(rng, width, height, avoided, count=1, part=0.4)
        shapes = _sample_shapes(rng, width, height, avoided, rng.randint(1, 3), words)
    return Picture(width, height, background, pattern, rng.getrandbits(32), shapes, words, chart)


def share_shape(pictures: Sequence[Picture], rng: random.Random) -> list[Picture]:
    """Two pictures; a shape of the second gets the kind of one of the first, of the same colour if possible."""
    first, second = pictures
    pairs = [(ours, theirs) for theirs in first.shapes for ours in second.shapes]
    if not pairs:
        return [first, second]
    ours, theirs = rng.choice([pair for pair in pairs if pair[0].colour == pair[1].colour] or pairs)
    shapes = tuple(replace(shape, kind=theirs.kind) if shape is ours else shape for shape in second.shapes)
    return [first, replace(second, shapes=shapes)]


def brightness(tone: RGB) -> float:
    """Luma of a tone, 0 to 255 (ITU-R BT.601)."""
    return 0.299 * tone[0] + 0.587 * tone[1] + 0.114 * tone[2]


def shifted(tone: RGB, step: int) -> RGB:
    """A tone that is lighter, or darker, by `step` in each channel."""
    return tuple(min(255, max(0, channel + step)) for channel in tone)


def varied(tone: RGB, most: int, rng: random.Random) -> RGB:
    """A tone that differs at random by up to `most` in each channel."""
    return tuple(min(255, max(0, channel + rng.randint(-most, most))) for channel in tone)


def _sample_background(rng: random.Random) -> tuple[tuple[RGB, RGB], str, frozenset[str]]:
    """Tones, pattern, and the names of the colours that would not stand out."""
    pattern = rng.choice(("plain", "plain", "plain", "gradient", "checks", "stripes", "noise"))
    mood = rng.choice(("white", "light", "light", "dark", "black", "grey"))
    base = {
        "white": (255, 255, 255),
        "light": tuple(rng.randint(205, 245) for _ in range(3)),
        "dark": tuple(rng.randint(15, 70) for _ in range(3)),
        "black": (0, 0, 0),
        "grey": (rng.randint(120, 150),) * 3,
    }[mood]
    change = rng.choice((-1, 1)) * rng.randint(8, 22)
    other = base if pattern == "plain" else shifted(base, change)
    avoided = {
        "white": {"white", "yellow"},
        "light": {"white", "yellow"},
        "dark": {"black", "blue", "purple"},
        "black": {"black", "blue", "purple"},
        "grey": set(),
    }[mood]
    if mood in ("white", "black"):
        avoided = avoided - {"yellow", "blue", "purple"}
    return (base, other), pattern, frozenset(avoided)


def _sample_colour(rng: random.Random, avoided: frozenset[str] | set[str]) -> tuple[str, RGB]:
    name = rng.choice([name for name in COLOURS if name not in avoided])
    tone = rng.choice(COLOURS[name])
    return name, varied(tone, 6, rng)


def _sample_shapes(
    rng: random.Random, width: int, height: int, avoided: frozenset[str], count: int, words: tuple[Word, ...] = ()
) -> tuple[Shape, ...]:
    """`count` shapes that do not touch each other or the words (fewer, if there is no room)."""
    short_side = min(width, height)
    shapes: list[Shape] = []
    # Often few kinds and colours, so that there is something to count.
    kinds = rng.sample(SHAPES, rng.choice((1, 2, 3, len(SHAPES), len(SHAPES))))
    names = [name for name in COLOURS if name not in avoided]
    excluded = avoided if rng.random() < 0.5 else set(COLOURS) - set(rng.sample(names, rng.choice((1, 2, 3))))
    for _ in range(count):
        colour, tone = _sample_colour(rng, excluded)
        for _ in range(50):
            radius = short_side * rng.uniform(0.1, 0.3 if count < 3 else 0.19)
            x, y = (rng.uniform(radius * 1.05, side - radius * 1.05) for side in (width, height))
            apart = all(math.hypot(x - other.x, y - other.y) > 1.1 * (radius + other.radius) for other in shapes)
            clear = all(
                abs(x - word.x) > word.width / 2 + radius * 1.1 or abs(y - word.y) > word.height * 0.7 + radius * 1.1
                for word in words
            )
            if apart and clear:
                shapes.append(Shape(rng.choice(kinds), colour, tone, x, y, radius, rng.uniform(-10, 10)))
                break
    return tuple(shapes)


def _sample_words(
    rng: random.Random, width: int, height: int, avoided: frozenset[str], count: int | None = None, part: float = 1
) -> tuple[Word, ...]:
    """Words and numbers in bands from top to bottom of a part of the height, large enough to be read at 144 pixels."""
    count = count or rng.choice((1, 1, 2, 3))
    long_side = max(width, height)
    band = height * part / count
    above = rng.uniform(0, height * (1 - part))
    words: list[Word] = []
    for i in range(count):
        text = sample_text(rng)
        least = min(0.95 * width, long_side * (0.12 * len(text) + 0.03))
        text_width = rng.uniform(least, max(least, 0.95 * width))
        text_height = rng.uniform(min(0.14 * long_side, band * 0.5), band * 0.62)
        card = None
        used = {word.colour for word in words}
        colour, tone = _sample_colour(rng, set(avoided) | used)
        if rng.random() < 0.3:
            names = [name for name in COLOURS if abs(brightness(COLOURS[name][0]) - brightness(tone)) > 90]
            if names:
                card = COLOURS[rng.choice(names)][0]
        angle = rng.choice((0, 0, rng.uniform(-6, 6)))
        x = rng.uniform(text_width / 2, width - text_width / 2)
        y = above + band * (i + 0.5) + rng.uniform(-1, 1) * (band - text_height) * 0.35
        words.append(Word(text, colour, tone, x, y, text_width, text_height, angle, rng.getrandbits(32), card))
    return tuple(words)


def _sample_page(rng: random.Random, width: int, height: int, avoided: frozenset[str]) -> tuple[Word, ...]:
    """Words and numbers of about one size per line, over the whole picture."""
    long_side = max(width, height)
    margin = 0.02 * long_side
    words: list[Word] = []
    top = margin
    while (band := long_side * rng.uniform(0.13, 0.24)) < height - top:
        left = margin
        while True:
            text = sample_text(rng)
            text_width = len(text) * max(long_side * 0.09, min(0.8 * band, 0.2 * long_side) * rng.uniform(0.8, 1.2))
            if left + text_width > width:
                break
            colour, tone = _sample_colour(rng, avoided)
            x, y = left + text_width / 2, top + band / 2
            angle = rng.choice((0, 0, rng.uniform(-5, 5)))
            words.append(Word(text, colour, tone, x, y, text_width, 0.8 * band, angle, rng.getrandbits(32), None))
            left += text_width + 1.5 * margin
        top += band
    return tuple(words)


def sample_text(rng: random.Random) -> str:
    """A number of up to 4 digits, a word, or a random string of up to 5 letters; upper, lower or title case."""
    if rng.random() < 0.3:
        return str(rng.randint(0, 10 ** rng.randint(1, 4) - 1))
    if rng.random() < 0.4:
        text = rng.choice(WORDS)
    else:
        text = "".join(rng.choices(string.ascii_lowercase, k=rng.choice((2, 3, 4, 4, 5, 5))))
    return rng.choice((str.upper, str.upper, str.upper, str.lower, str.lower, str.title))(text)


def _sample_chart(rng: random.Random, width: int, height: int, background: RGB, avoided: frozenset[str]) -> Chart:
    count = rng.randint(2, 5)
    names = rng.sample([name for name in COLOURS if name not in avoided], count)
    while True:
        values = [rng.uniform(0.12, 1) for _ in range(count)]
        ordered = sorted(values)
        if ordered[-1] - ordered[-2] > 0.08 and (count == 2 or ordered[1] - ordered[0] > 0.08):
            break
    left, right = width * rng.uniform(0.05, 0.15), width * rng.uniform(0.85, 0.97)
    top, bottom = height * rng.uniform(0.04, 0.15), height * rng.uniform(0.85, 0.96)
    tones = tuple(rng.choice(COLOURS[name]) for name in names)
    ink = (40, 40, 40) if brightness(background) > 110 else (225, 225, 225)
    scale = rng.uniform(0.75, 1)
    values = tuple(value * scale for value in values)
    box = (left, top, right, bottom)
    return Chart(tuple(names), tones, values, box, rng.uniform(0.15, 0.5), rng.random() < 0.4, rng.random() < 0.3, ink)

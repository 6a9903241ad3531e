"""Pictures of the synthetic world in other styles: neat rows, outlines, shadows, panels, labelled charts."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFilter

from recipes.tiny.world.draw import FONTS, OUTLINES, bars, draw, draw_background, draw_word, font_of_size
from recipes.tiny.world.scene import (
    COLOURS,
    RGB,
    SHAPES,
    Chart,
    Picture,
    Shape,
    Word,
    brightness,
    sample_text,
    shifted,
    varied,
)

SCALE = 2
"""How many times larger shapes and bars are drawn before they are shrunk, so that their edges are smooth."""

TONES: dict[str, tuple[RGB, ...]] = {
    "red": ((214, 39, 40), (220, 20, 60), (229, 57, 53), (232, 32, 42)),
    "orange": ((255, 127, 14), (255, 140, 0), (251, 140, 0), (245, 138, 7)),
    "yellow": ((255, 215, 0), (253, 216, 53), (249, 200, 14), (245, 200, 0)),
    "green": ((44, 160, 44), (34, 139, 34), (46, 139, 87), (67, 160, 71), (60, 220, 90)),
    "blue": ((31, 119, 180), (65, 105, 225), (30, 136, 229), (21, 70, 196)),
    "purple": ((142, 36, 170), (106, 31, 181), (125, 42, 232), (130, 50, 180)),
    "black": ((17, 17, 17), (33, 33, 33)),
    "white": ((255, 255, 255), (245, 245, 245)),
}
"""Tones of the world's colours that other programs draw with."""

LABELS = ("A", "B", "C", "D", "E", "Mon", "Tue", "Wed", "Jan", "Feb", "Q1", "Q2", "Q3", "2019", "2020", "x", "y", "ab")


@dataclass(frozen=True)
class PaintedPicture(Picture):
    """A picture in another style.

    Attributes:
        backdrop: what lies over the background: nothing, `panel`, `dots`, `rules` or `grid`.
        backdrop_tone: its tone.
        rim: tone of a line around shapes and bars; None for none.
        rim_width: as a fraction of a shape's radius.
        shadow: whether things cast one.
        blur: radius, in pixels, by which the picture is blurred; 0 for none.
    """

    backdrop: str = ""
    backdrop_tone: RGB = (0, 0, 0)
    rim: RGB | None = None
    rim_width: float = 0
    shadow: bool = False
    blur: float = 0

    @property
    def behind(self) -> tuple[RGB, ...]:
        """The tones of most of the area behind the things."""
        return (*self.background, self.backdrop_tone) if self.backdrop == "panel" else self.background


def sample_painted(rng: random.Random, kind: str) -> PaintedPicture:
    """A random picture of a kind: `shapes`, `words`, `chart` or `mixed` (shapes under or over one word)."""
    long_side = rng.randint(200, 480)
    short_side = round(long_side * rng.choice((1, 0.75, 0.667, rng.uniform(0.6, 1))))
    width, height = rng.choice(((long_side, short_side), (long_side, short_side), (short_side, long_side)))
    names: list[str] = []
    while len(names) < 4:  # some backgrounds leave too few colours that stand out
        background, pattern = _sample_background(rng)
        backdrop = rng.choice(("", "", "", "panel", "dots", "rules", "grid")) if kind != "chart" else ""
        backdrop_tone = _near(rng, background[0])
        behind = [*background, backdrop_tone] if backdrop else background
        names = [name for name in COLOURS if _stands_out(name, behind)]
    shapes: tuple[Shape, ...] = ()
    words: tuple[Word, ...] = ()
    chart, labelled = None, False
    if kind == "chart":
        chart = _sample_chart(rng, width, height, background[0], names)
        labelled = rng.random() < 0.6
    elif kind == "words":
        words = _sample_sign(rng, width, height, names)
    elif kind == "mixed":
        words = _sample_sign(rng, width, height, names, part=0.42)
        shapes = _sample_shapes(rng, (0.0, 0.46 * height, width, height), names, most=3)
        if rng.random() < 0.5:  # the word below
            words = tuple(_flipped(word, height) for word in words)
            shapes = tuple(_flipped(shape, height) for shape in shapes)
    else:
        shapes = _sample_shapes(rng, (0.0, 0.0, width, height), names, most=5)
    # A rim must not be taken for the shape's colour, and is thin.
    rim = rng.choice((None, None, None, (30, 30, 30), (90, 90, 90), (255, 255, 255)))
    return PaintedPicture(
        width,
        height,
        background,
        pattern,
        rng.getrandbits(32),
        shapes,
        words,
        chart,
        labelled,
        backdrop,
        backdrop_tone,
        rim,
        rng.uniform(0.03, 0.09),
        rng.random() < 0.12,
        rng.choice((0, 0, 0, rng.uniform(0.3, 0.9))),
    )


def _stands_out(name: str, behind: Sequence[RGB]) -> bool:
    """Whether all tones of a colour differ clearly from all tones behind them."""
    tones = (*TONES[name], *COLOURS[name])
    return all(sum(abs(a - b) for a, b in zip(tone, other, strict=True)) > 150 for tone in tones for other in behind)


def _near(rng: random.Random, tone: RGB) -> RGB:
    """A tone that differs a little from another."""
    step = rng.choice((-1, 1)) * rng.randint(10, 26)
    step = -abs(step) if brightness(tone) > 215 else abs(step) if brightness(tone) < 40 else step
    return shifted(tone, step)


def _sample_background(rng: random.Random) -> tuple[tuple[RGB, RGB], str]:
    """Two tones, and `plain` or `gradient`."""
    mood = rng.choices(("white", "light", "dark", "black", "grey", "colour"), (30, 30, 12, 6, 8, 14))[0]
    base = {
        "white": (255, 255, 255),
        "light": tuple(rng.randint(190, 255) for _ in range(3)),
        "dark": tuple(rng.randint(10, 95) for _ in range(3)),
        "black": (0, 0, 0),
        "grey": (rng.randint(95, 190),) * 3,
        "colour": _tone(rng, rng.choice(("red", "orange", "yellow", "green", "blue", "purple"))),
    }[mood]
    if rng.random() < 0.75:
        return (base, base), "plain"
    return (base, varied(base, 45, rng)), "gradient"


def _tone(rng: random.Random, name: str) -> RGB:
    tone = rng.choice((*TONES[name], *COLOURS[name]))
    return varied(tone, 5, rng)


def _sample_shapes(
    rng: random.Random, box: tuple[float, float, float, float], names: Sequence[str], most: int
) -> tuple[Shape, ...]:
    """Shapes of about one size in a row, a column, a grid or anywhere, often several of one kind and colour."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    count = rng.randint(1, most)
    kinds = rng.sample(SHAPES, rng.choice((1, 1, 2, 2, 3, 8)))
    colours = rng.sample(list(names), min(len(names), rng.choice((1, 1, 2, 3, 6))))
    layout = rng.choice(("row", "column", "grid", "grid", "free", "free", "free"))
    if count > 3 and layout in ("row", "column"):  # along the longer side
        layout = "row" if width > height else "column"
    if layout == "row":
        columns, rows = count, 1
    elif layout == "column":
        columns, rows = 1, count
    else:
        columns = max(2, math.ceil(math.sqrt(count * width / height)))
        rows = max(1 if columns >= count else 2, math.ceil(count / columns))
    cell_width, cell_height = width / columns, height / rows
    cells = [(column, row) for row in range(rows) for column in range(columns)]
    cells = sorted(rng.sample(cells, count)) if layout == "free" else cells[:count]
    largest = min(0.47 * min(cell_width, cell_height), 0.34 * min(width, height))
    radius = largest * rng.uniform(0.62, 0.98)
    shapes = []
    for column, row in cells:
        own = radius * rng.uniform(0.92, 1.0) if layout != "free" else radius * rng.uniform(0.75, 1.0)
        x, y = left + (column + 0.5) * cell_width, top + (row + 0.5) * cell_height
        if layout == "free":
            x += rng.uniform(-1, 1) * max(0.0, cell_width / 2 - own)
            y += rng.uniform(-1, 1) * max(0.0, cell_height / 2 - own)
        colour = rng.choice(colours)
        angle = rng.uniform(-12, 12) if rng.random() < 0.1 else 0.0
        shapes.append(Shape(rng.choice(kinds), colour, _tone(rng, colour), x, y, own, angle))
    return tuple(shapes)


def _sample_sign(
    rng: random.Random, width: int, height: int, names: Sequence[str], part: float = 1
) -> tuple[Word, ...]:
    """One word, or up to three under each other, large and upright; on cards at times."""
    count = 1 if part < 1 else rng.choice((1, 1, 2, 3))
    band = height * part / count
    colours = rng.sample(list(names), min(count, len(names)))
    words = []
    for i, colour in enumerate(colours):
        text, tone, card = sample_text(rng), _tone(rng, colour), None
        if rng.random() < 0.3:
            cards = [name for name in COLOURS if abs(brightness(COLOURS[name][0]) - brightness(tone)) > 90]
            card = _tone(rng, rng.choice(cards)) if cards else None
        text_width = min(0.92 * width, max(width, height) * rng.uniform(0.15, 0.24) * len(text))
        words.append(
            Word(
                text,
                colour,
                tone,
                width / 2,
                band * (i + 0.5),
                text_width,
                band * rng.uniform(0.45, 0.68),
                0,
                rng.getrandbits(32),
                card,
            )
        )
    return tuple(words)


def _flipped(thing: Shape | Word, height: float) -> Shape | Word:
    """A thing mirrored vertically: only its place changes."""
    return type(thing)(**{**vars(thing), "y": height - thing.y})


def _sample_chart(rng: random.Random, width: int, height: int, background: RGB, names: Sequence[str]) -> Chart:
    count = rng.randint(2, min(5, len(names)))
    colours = tuple(rng.sample(list(names), count))
    while True:
        values = [rng.uniform(0.08, 1) for _ in range(count)]
        ordered = sorted(values)
        if ordered[-1] - ordered[-2] > 0.08 and (count == 2 or ordered[1] - ordered[0] > 0.08):
            break
    box = (
        width * rng.uniform(0.08, 0.16),
        height * rng.uniform(0.05, 0.16),
        width * 0.95,
        height * rng.uniform(0.84, 0.92),
    )
    ink = (40, 40, 40) if brightness(background) > 110 else (225, 225, 225)
    tones = tuple(_tone(rng, name) for name in colours)
    return Chart(colours, tones, tuple(values), box, rng.uniform(0.1, 0.5), rng.random() < 0.5, rng.random() < 0.4, ink)


@draw.register
def draw_painted(picture: PaintedPicture) -> Image.Image:
    """The picture as an RGB image."""
    image = draw_background(picture)
    _draw_backdrop(ImageDraw.Draw(image), picture)
    if picture.shapes or picture.chart:
        large = (picture.width * SCALE, picture.height * SCALE)
        layer, mask = image.resize(large, Image.Resampling.BILINEAR), Image.new("L", large)
        for canvas, inks in ((ImageDraw.Draw(layer), None), (ImageDraw.Draw(mask), 255)):
            for shape in picture.shapes:
                _draw_shape(canvas, shape, picture, inks)
            if picture.chart:
                _draw_bars(canvas, picture.chart, picture, inks)
        mask = mask.reduce(SCALE)
        if picture.shadow:
            offset = max(2, picture.width // 60)
            shadow = Image.new("L", image.size)
            shadow.paste(mask.point(lambda value: value // 3), (offset, offset))
            image.paste((0, 0, 0), mask=shadow.filter(ImageFilter.GaussianBlur(offset / 2)))
        if picture.chart:
            _draw_axes(image, picture)
        image.paste(layer.reduce(SCALE), mask=mask)
    for word in picture.words:
        draw_word(image, word)
    return image.filter(ImageFilter.GaussianBlur(picture.blur)) if picture.blur else image


def _draw_backdrop(canvas: ImageDraw.ImageDraw, picture: PaintedPicture) -> None:
    width, height, tone = picture.width, picture.height, picture.backdrop_tone
    step = max(12, min(width, height) // (6 + picture.seed % 7))
    if picture.backdrop == "panel":
        inset = min(width, height) // 25
        box = (inset, inset, width - inset, height - inset)
        canvas.rounded_rectangle(box, inset * (picture.seed % 3), fill=tone)
    elif picture.backdrop == "dots":
        for x in range(step // 2, width, step):
            for y in range(step // 2, height, step):
                canvas.ellipse(
                    (x - step // 12 - 1, y - step // 12 - 1, x + step // 12 + 1, y + step // 12 + 1), fill=tone
                )
    elif picture.backdrop in ("rules", "grid"):
        for y in range(step // 2, height, step):
            canvas.line((0, y, width, y), fill=tone, width=1 + picture.seed % 2)
        for x in range(step // 2, width, step) if picture.backdrop == "grid" else ():
            canvas.line((x, 0, x, height), fill=tone, width=1 + picture.seed % 2)


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: Shape, picture: PaintedPicture, ink: int | None) -> None:
    """Draw a shape `SCALE` times as large; with `ink`, shape and rim are in that one tone."""
    x, y, r = shape.x * SCALE, shape.y * SCALE, shape.radius * SCALE
    fill = shape.tone if ink is None else ink
    rim = None if picture.rim is None else picture.rim if ink is None else ink
    line = round(r * picture.rim_width)
    if shape.kind == "ring":
        band = round(r * (0.22 + 0.16 * (picture.seed % 5) / 4))
        if rim is not None:
            canvas.ellipse((x - r - line, y - r - line, x + r + line, y + r + line), outline=rim, width=band + 2 * line)
        canvas.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=band)
        return
    if shape.kind == "circle":
        points = [(math.cos(i * math.pi / 60), math.sin(i * math.pi / 60)) for i in range(120)]
    else:
        points = OUTLINES[shape.kind]
    angle = math.radians(shape.angle)
    cos, sin = math.cos(angle) * r, math.sin(angle) * r
    corners = [(x + cos * a - sin * b, y + sin * a + cos * b) for a, b in points]
    canvas.polygon(corners, fill=fill)
    if rim is not None and line:
        canvas.line([*corners, corners[0], corners[1]], fill=rim, width=line, joint="curve")


def _draw_bars(canvas: ImageDraw.ImageDraw, chart: Chart, picture: PaintedPicture, ink: int | None) -> None:
    rim = chart.ink if chart.frame else None
    for tone, (left, top, right, bottom) in zip(chart.tones, bars(chart), strict=True):
        box = tuple(SCALE * length for length in (left, min(top, bottom - 1), right, bottom))
        canvas.rectangle(box, fill=tone if ink is None else ink, outline=rim if ink is None else ink, width=SCALE)


def _draw_axes(image: Image.Image, picture: PaintedPicture) -> None:
    """A chart's grid, axes, and, where the picture is labelled, ticks and small texts."""
    chart, rng, canvas = picture.chart, random.Random(picture.seed), ImageDraw.Draw(image)
    left, top, right, bottom = chart.box
    base = picture.background[0]
    faint = tuple(round(0.75 * channel + 0.25 * ink) for channel, ink in zip(base, chart.ink, strict=True))
    if chart.grid:
        for i in range(1, 5):
            y = bottom - (bottom - top) * i / 4
            canvas.line((left, y, right, y), fill=faint)
    style = rng.choice(("corner", "corner", "box", "base"))
    lines = {
        "corner": [(left, top, left, bottom), (left, bottom, right, bottom)],
        "base": [(left, bottom, right, bottom)],
        "box": [
            (left, top, right, top),
            (right, top, right, bottom),
            (left, bottom, right, bottom),
            (left, top, left, bottom),
        ],
    }[style]
    for line in lines:
        canvas.line(line, fill=chart.ink, width=rng.choice((1, 2)))
    if not picture.labelled:
        return
    size = max(8, round(min(picture.width, picture.height) * rng.uniform(0.035, 0.05)))
    font = font_of_size(FONTS[rng.randrange(len(FONTS))], size)
    most = rng.choice((1, 5, 10, 50, 100))
    for i in range(5):
        y = bottom - (bottom - top) * i / 4
        canvas.line((left - 3, y, left, y), fill=chart.ink)
        canvas.text((left - 5, y), f"{most * i / 4:g}", fill=chart.ink, font=font, anchor="rm")
    if rng.random() < 0.7:
        labels = rng.sample(LABELS, len(chart.values))
        for label, (start, _, end, _) in zip(labels, bars(chart), strict=True):
            canvas.text(((start + end) / 2, bottom + 3), label, fill=chart.ink, font=font, anchor="mt")

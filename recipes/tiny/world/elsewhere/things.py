"""Drawings of things that the synthetic world lacks: houses, cars, animals, people; filled, or of lines alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from recipes.tiny.world.elsewhere.scenes import draw_landscape
from recipes.tiny.world.elsewhere.textures import as_image, coloured, fractal, palette

Tone = tuple[int, int, int]
SCALE = 2
"""How many times larger everything is drawn before it is shrunk."""


@dataclass
class Pen:
    """Draws in the square from -1 to 1 around a point (y down).

    Attributes:
        canvas: the one to draw on.
        rng: chooses tones.
        x, y, size: the point, and the length of 1 in pixels.
        mirrored: whether left and right are exchanged.
        filled: whether areas are filled; otherwise they are outlines.
        ink: tone of lines; None for areas without any.
        width: of lines, in pixels.
    """

    canvas: ImageDraw.ImageDraw
    rng: np.random.Generator
    x: float
    y: float
    size: float
    mirrored: bool
    filled: bool
    ink: Tone | None
    width: int

    def _place(self, point: tuple[float, float]) -> tuple[float, float]:
        return self.x + (-point[0] if self.mirrored else point[0]) * self.size, self.y + point[1] * self.size

    def tone(self, *bases: Tone) -> Tone:
        """One of the tones, a little changed; without any, a random one."""
        base = bases[self.rng.integers(len(bases))] if bases else self.rng.integers(0, 256, 3)
        return tuple(int(v) for v in np.clip(np.array(base) + self.rng.normal(0, 14, 3), 0, 255))

    def area(self, points: Sequence[tuple[float, float]], tone: Tone) -> None:
        """Draw a filled polygon, or its outline."""
        corners = [self._place(point) for point in points]
        if self.filled:
            self.canvas.polygon(corners, fill=tone)
        if self.ink or not self.filled:
            self.canvas.line([*corners, corners[0], corners[1]], fill=self.ink or tone, width=self.width, joint="curve")

    def oval(self, x: float, y: float, wide: float, high: float, tone: Tone, turn: float = 0) -> None:
        """Draw an ellipse with the half axes `wide` and `high`."""
        cos, sin = math.cos(turn), math.sin(turn)
        circle = [(wide * math.cos(i * math.pi / 20), high * math.sin(i * math.pi / 20)) for i in range(40)]
        self.area([(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in circle], tone)

    def box(self, left: float, top: float, right: float, bottom: float, tone: Tone) -> None:
        """Draw a rectangle."""
        self.area([(left, top), (right, top), (right, bottom), (left, bottom)], tone)

    def line(self, points: Sequence[tuple[float, float]], tone: Tone, width: float = 0.03) -> None:
        """Draw an open line; its width is in units of the square."""
        pixels = max(self.width, round(width * self.size)) if self.filled else self.width
        self.canvas.line([self._place(p) for p in points], fill=self.ink or tone, width=pixels, joint="curve")


BROWN, SKIN, GREY, DARK, LEAF = (120, 75, 40), (235, 190, 160), (140, 140, 145), (40, 40, 45), (50, 130, 50)
WHITE, PINK, GLASS, STRAW = (245, 245, 245), (240, 150, 170), (170, 210, 230), (225, 190, 110)


def _house(pen: Pen) -> None:
    wall = pen.tone((225, 200, 160), (200, 90, 70), WHITE, (170, 190, 210))
    wide, eaves = pen.rng.uniform(0.55, 0.95), pen.rng.uniform(-0.3, 0)
    if pen.rng.random() < 0.6:
        pen.box(0.25, eaves - 0.6, 0.42, eaves, pen.tone(GREY, BROWN))
    pen.box(-wide, eaves, wide, 0.9, wall)
    pen.area([(-wide - 0.12, eaves), (0, eaves - pen.rng.uniform(0.4, 0.8)), (wide + 0.12, eaves)],
             pen.tone((150, 50, 40), BROWN, GREY))  # fmt: skip
    pen.box(-0.15, 0.4, 0.15, 0.9, pen.tone(BROWN, DARK, (60, 90, 140)))
    for left in (-wide + 0.12, wide - 0.38):
        pen.box(left, eaves + 0.2, left + 0.26, eaves + 0.46, pen.tone(GLASS, (250, 230, 140)))
        pen.line([(left + 0.13, eaves + 0.2), (left + 0.13, eaves + 0.46)], DARK)


def _tree(pen: Pen) -> None:
    pen.box(-0.12, 0.1, 0.12, 0.95, pen.tone(BROWN))
    leaf = pen.tone(LEAF, (90, 150, 60), (200, 110, 40))
    if pen.rng.random() < 0.4:
        for i in range(3):
            top = -0.95 + 0.35 * i
            pen.area([(-0.3 - 0.17 * i, top + 0.6), (0, top), (0.3 + 0.17 * i, top + 0.6)], leaf)
        return
    for _ in range(int(pen.rng.integers(4, 9))):
        x, y = pen.rng.uniform(-0.4, 0.4), pen.rng.uniform(-0.65, 0.05)
        pen.oval(x, y, *pen.rng.uniform(0.25, 0.45, 2), pen.tone(leaf))


def _car(pen: Pen) -> None:
    paint = pen.tone()
    pen.area([(-0.5, 0), (-0.3, -0.38), (0.3, -0.38), (0.55, 0)], paint)
    pen.box(-0.95, 0, 0.95, 0.4, paint)
    pen.area([(-0.4, -0.02), (-0.25, -0.31), (-0.03, -0.31), (-0.03, -0.02)], pen.tone(GLASS))
    pen.area([(0.03, -0.02), (0.03, -0.31), (0.26, -0.31), (0.44, -0.02)], pen.tone(GLASS))
    for x in (-0.52, 0.52):
        pen.oval(x, 0.4, 0.21, 0.21, pen.tone(DARK))
        pen.oval(x, 0.4, 0.1, 0.1, pen.tone(GREY))


def _person(pen: Pen) -> None:
    skin, shirt, trousers = pen.tone(SKIN, BROWN), pen.tone(), pen.tone(DARK, (50, 70, 120), GREY)
    if pen.rng.random() < 0.35:  # a stick man
        pen.oval(0, -0.7, 0.2, 0.2, skin)
        reach = pen.rng.uniform(-0.35, 0.3)
        for line in (
            [(0, -0.5), (0, 0.3)],
            [(-0.4, reach), (0, -0.25), (0.4, -reach)],
            [(-0.3, 0.95), (0, 0.3), (0.3, 0.95)],
        ):
            pen.line(line, DARK, 0.05)
        return
    for side in (-1, 1):
        pen.area([(side * 0.02, 0.25), (side * 0.26, 0.25), (side * 0.24, 0.95), (side * 0.06, 0.95)], trousers)
        hand = pen.rng.uniform(-0.2, 0.4)
        pen.line([(side * 0.28, -0.3), (side * 0.5, hand)], shirt, 0.14)
        pen.oval(side * 0.5, hand, 0.09, 0.09, skin)
    pen.area([(-0.32, -0.4), (0.32, -0.4), (0.27, 0.3), (-0.27, 0.3)], shirt)
    pen.oval(0, -0.66, 0.2, 0.24, skin)
    hair = pen.tone(BROWN, DARK, STRAW, GREY)
    pen.area([(-0.22, -0.68), (-0.16, -0.9), (0, -0.96), (0.16, -0.9), (0.22, -0.68), (0.1, -0.8), (-0.1, -0.8)], hair)


def _face(pen: Pen) -> None:
    skin = pen.tone(SKIN, BROWN, (250, 215, 80))
    pen.oval(0, 0, 0.75, 0.9, skin)
    if pen.rng.random() < 0.6:
        pen.area([(-0.75, -0.1), (-0.65, -0.7), (0, -1), (0.65, -0.7), (0.75, -0.1), (0.45, -0.5), (-0.45, -0.5)],
                 pen.tone(BROWN, DARK, STRAW))  # fmt: skip
    for x in (-0.3, 0.3):
        pen.oval(x, -0.15, 0.14, 0.1, WHITE)
        pen.oval(x, -0.15, 0.06, 0.08, pen.tone(DARK, (60, 110, 170)))
        pen.line([(x - 0.15, -0.35), (x, -0.4), (x + 0.15, -0.35)], DARK)
    pen.line([(0, -0.1), (-0.08, 0.2), (0.06, 0.22)], BROWN)
    bend = pen.rng.uniform(-0.15, 0.25)
    pen.line([(-0.3, 0.45), (-0.15, 0.45 + bend), (0.15, 0.45 + bend), (0.3, 0.45)], pen.tone((170, 50, 50)), 0.05)


def _flower(pen: Pen) -> None:
    pen.line([(0, 0.1), (0.05, 0.95)], LEAF, 0.06)
    pen.oval(0.25, 0.6, 0.22, 0.09, pen.tone(LEAF), -0.5)
    petals, petal = int(pen.rng.integers(5, 11)), pen.tone(PINK, WHITE, (230, 60, 60), (250, 200, 40), (130, 80, 190))
    for i in range(petals):
        angle = 2 * math.pi * i / petals
        pen.oval(0.42 * math.cos(angle), -0.3 + 0.42 * math.sin(angle), 0.27, 0.13, petal, angle)
    pen.oval(0, -0.3, 0.2, 0.2, pen.tone((250, 190, 40), BROWN))


def _fish(pen: Pen) -> None:
    scale = pen.tone()
    pen.area([(0.5, 0), (0.95, -0.4), (0.85, 0), (0.95, 0.4)], pen.tone(scale))
    pen.area([(-0.1, -0.3), (0.2, -0.65), (0.35, -0.25)], pen.tone(scale))
    pen.oval(-0.1, 0, 0.7, 0.4, scale)
    pen.oval(-0.5, -0.1, 0.08, 0.08, WHITE)
    pen.oval(-0.5, -0.1, 0.04, 0.04, DARK)
    pen.line([(-0.25, -0.3), (-0.15, 0), (-0.25, 0.3)], DARK)
    pen.line([(-0.78, 0.1), (-0.6, 0.14)], DARK)


def _boat(pen: Pen) -> None:
    pen.area([(-0.9, 0.3), (0.9, 0.3), (0.6, 0.75), (-0.6, 0.75)], pen.tone(BROWN, (180, 50, 50), (50, 80, 150)))
    pen.line([(0, 0.3), (0, -0.95)], BROWN, 0.05)
    pen.area([(0.06, -0.85), (0.06, 0.15), (0.7, 0.15)], pen.tone(WHITE, STRAW))
    pen.area([(-0.06, -0.7), (-0.06, 0.15), (-0.55, 0.15)], pen.tone(WHITE, PINK))
    pen.line([(i / 5 - 1, 0.8 + 0.06 * (i % 2)) for i in range(11)], (60, 120, 190), 0.04)


def _cat(pen: Pen) -> None:
    fur = pen.tone(GREY, DARK, (220, 140, 60), WHITE)
    pen.line([(0.45, 0.7), (0.85, 0.55), (0.8, 0.1)], fur, 0.12)
    pen.oval(0.1, 0.45, 0.48, 0.48, fur)
    for x in (-0.5, -0.05):
        pen.area([(x - 0.05, -0.4), (x + 0.03, -0.85), (x + 0.3, -0.55)], fur)
    pen.oval(-0.2, -0.25, 0.42, 0.36, fur)
    for x in (-0.36, -0.04):
        pen.oval(x, -0.3, 0.07, 0.09, pen.tone((120, 190, 80), (240, 200, 60)))
        pen.oval(x, -0.3, 0.025, 0.08, DARK)
    pen.area([(-0.26, -0.16), (-0.14, -0.16), (-0.2, -0.08)], PINK)
    for side in (-1, 1):
        for drop in (-0.06, 0.04):
            pen.line([(-0.2 + side * 0.12, -0.1), (-0.2 + side * 0.6, -0.1 + drop)], DARK, 0.01)
    for x in (-0.15, 0.2):
        pen.oval(x, 0.88, 0.16, 0.08, fur)


def _dog(pen: Pen) -> None:
    fur = pen.tone(BROWN, STRAW, GREY, WHITE, DARK)
    pen.oval(0.1, 0.15, 0.6, 0.3, fur)
    for x in (-0.35, -0.15, 0.4, 0.58):
        pen.box(x, 0.25, x + 0.12, 0.85, fur)
    pen.line([(0.65, 0.05), (0.95, -0.35)], fur, 0.1)
    pen.oval(-0.55, -0.3, 0.32, 0.27, fur)
    pen.oval(-0.83, -0.2, 0.17, 0.13, fur)
    pen.oval(-0.35, -0.25, 0.13, 0.3, pen.tone(fur, BROWN), 0.2)
    pen.oval(-0.97, -0.24, 0.05, 0.05, DARK)
    pen.oval(-0.62, -0.38, 0.04, 0.05, DARK)


def _bird(pen: Pen) -> None:
    feather = pen.tone()
    pen.area([(0.4, 0), (0.95, -0.15), (0.9, 0.2)], feather)
    pen.oval(0, 0.05, 0.5, 0.33, feather)
    pen.oval(-0.45, -0.3, 0.25, 0.24, feather)
    pen.area([(-0.68, -0.33), (-0.95, -0.22), (-0.66, -0.2)], pen.tone((245, 160, 30)))
    pen.oval(-0.5, -0.36, 0.04, 0.04, DARK)
    pen.area([(-0.2, 0), (0.45, -0.55), (0.35, 0.15)], pen.tone(feather))
    for x in (-0.1, 0.1):
        pen.line([(x, 0.35), (x, 0.75), (x - 0.12, 0.8)], (245, 160, 30), 0.03)


def _mug(pen: Pen) -> None:
    tone = pen.tone()
    pen.oval(0.55, 0.1, 0.3, 0.32, tone)
    pen.oval(0.55, 0.1, 0.18, 0.2, WHITE)
    pen.box(-0.6, -0.45, 0.5, 0.7, tone)
    pen.oval(-0.05, -0.45, 0.55, 0.14, pen.tone(BROWN, WHITE))
    for x in (-0.3, 0, 0.3):
        pen.line([(x, -0.6), (x + 0.06, -0.72), (x, -0.84), (x + 0.06, -0.95)], GREY)


def _umbrella(pen: Pen) -> None:
    arc = [(0.9 * math.cos(a), 0.9 * math.sin(a)) for a in np.linspace(math.pi, 2 * math.pi, 24)]
    tone = pen.tone()
    pen.area(arc, tone)
    for x in (-0.6, 0, 0.6):
        pen.oval(x, 0, 0.3, 0.08, pen.tone(tone))
    pen.line([(0, 0), (0, 0.75), (0.08, 0.88), (0.2, 0.85), (0.22, 0.72)], DARK, 0.05)


def _snowman(pen: Pen) -> None:
    for y, radius in ((0.55, 0.42), (-0.08, 0.3), (-0.55, 0.22)):
        pen.oval(0, y, radius, radius, WHITE)
    pen.box(-0.22, -1, 0.22, -0.76, DARK)
    pen.box(-0.36, -0.78, 0.36, -0.72, DARK)
    pen.area([(0, -0.55), (0.35, -0.48), (0, -0.47)], (240, 130, 30))
    for x, y in ((-0.08, -0.62), (0.08, -0.62), (0, -0.15), (0, 0.02)):
        pen.oval(x, y, 0.035, 0.035, DARK)
    for side in (-1, 1):
        pen.line([(side * 0.28, -0.1), (side * 0.8, -0.35)], BROWN)


def _rocket(pen: Pen) -> None:
    pen.area([(-0.2, 0.5), (0, 0.98), (0.2, 0.5)], pen.tone((250, 160, 30), (230, 60, 40)))
    for side in (-1, 1):
        pen.area([(side * 0.25, 0), (side * 0.6, 0.6), (side * 0.22, 0.5)], pen.tone((210, 50, 50), (50, 80, 160)))
    pen.area([(-0.26, 0.5), (-0.3, -0.3), (0, -0.95), (0.3, -0.3), (0.26, 0.5)], pen.tone(WHITE, GREY))
    pen.oval(0, -0.15, 0.14, 0.14, pen.tone(GLASS))


def _aeroplane(pen: Pen) -> None:
    body = pen.tone(WHITE, GREY, (180, 200, 230))
    pen.area([(0.1, 0.05), (0.55, 0.75), (0.3, 0.75), (-0.25, 0.05)], pen.tone(body, GREY))
    pen.area([(0.7, -0.05), (0.95, -0.5), (0.8, -0.5), (0.5, -0.05)], pen.tone())
    pen.oval(0, 0, 0.95, 0.16, body)
    for i in range(6):
        pen.oval(-0.55 + 0.18 * i, -0.04, 0.04, 0.04, GLASS)


def _apple(pen: Pen) -> None:
    tone = pen.tone((200, 40, 40), (120, 180, 60), (230, 190, 60))
    for side in (-1, 1):
        pen.oval(side * 0.25, 0.15, 0.45, 0.6, tone)
    pen.line([(0, -0.35), (0.08, -0.8)], BROWN, 0.06)
    pen.oval(0.3, -0.65, 0.22, 0.1, pen.tone(LEAF), -0.4)
    pen.oval(-0.35, -0.05, 0.08, 0.16, WHITE, 0.4)


def _mushroom(pen: Pen) -> None:
    pen.area([(-0.2, 0), (0.2, 0), (0.28, 0.85), (-0.28, 0.85)], pen.tone(STRAW, WHITE))
    arc = [(0.8 * math.cos(a), 0.75 * math.sin(a) + 0.05) for a in np.linspace(math.pi, 2 * math.pi, 24)]
    pen.area(arc, pen.tone((200, 40, 40), BROWN))
    for x, y in ((-0.4, -0.25), (0, -0.45), (0.4, -0.2), (-0.1, -0.12)):
        pen.oval(x, y, 0.11, 0.09, WHITE)


def _butterfly(pen: Pen) -> None:
    upper, lower = pen.tone(), pen.tone()
    for side in (-1, 1):
        pen.oval(side * 0.5, -0.3, 0.48, 0.36, upper, side * -0.5)
        pen.oval(side * 0.4, 0.35, 0.33, 0.33, lower, side * 0.5)
        pen.oval(side * 0.55, -0.32, 0.14, 0.11, pen.tone(WHITE, DARK))
        pen.line([(0, -0.45), (side * 0.25, -0.9)], DARK)
    pen.oval(0, 0, 0.07, 0.5, DARK)


def _key(pen: Pen) -> None:
    metal = pen.tone(GREY, STRAW)
    pen.oval(-0.6, 0, 0.33, 0.33, metal)
    pen.oval(-0.6, 0, 0.15, 0.15, DARK)
    pen.box(-0.3, -0.07, 0.9, 0.07, metal)
    for x in (0.5, 0.7):
        pen.box(x, 0.07, x + 0.1, 0.28, metal)


def _glasses(pen: Pen) -> None:
    for x in (-0.48, 0.48):
        pen.oval(x, 0, 0.38, 0.32, pen.tone(DARK, GLASS))
    pen.line([(-0.1, -0.05), (0, -0.12), (0.1, -0.05)], DARK, 0.05)
    for side in (-1, 1):
        pen.line([(side * 0.86, -0.05), (side * 0.98, -0.3)], DARK, 0.05)


def _bottle(pen: Pen) -> None:
    glass = pen.tone(LEAF, BROWN, GLASS)
    pen.area([(-0.12, -0.95), (0.12, -0.95), (0.12, -0.5), (0.33, -0.25), (0.33, 0.95), (-0.33, 0.95), (-0.33, -0.25),
              (-0.12, -0.5)], glass)  # fmt: skip
    pen.box(-0.33, 0.1, 0.33, 0.6, pen.tone(WHITE, STRAW))
    pen.line([(-0.2, 0.3), (0.2, 0.3)], DARK)


def _chair(pen: Pen) -> None:
    wood = pen.tone(BROWN, STRAW, DARK)
    for x in (-0.45, 0.35):
        pen.box(x, 0.15, x + 0.1, 0.95, wood)
    pen.box(-0.5, -0.95, -0.4, 0.15, wood)
    pen.box(-0.5, 0.05, 0.5, 0.2, wood)
    pen.area([(-0.4, -0.9), (-0.28, -0.9), (-0.28, 0.05), (-0.4, 0.05)], pen.tone(wood))


def _lamp(pen: Pen) -> None:
    pen.area([(-0.3, -0.9), (0.3, -0.9), (0.6, -0.2), (-0.6, -0.2)], pen.tone(STRAW, PINK, WHITE))
    pen.box(-0.05, -0.2, 0.05, 0.75, pen.tone(GREY, DARK))
    pen.oval(0, 0.8, 0.4, 0.1, pen.tone(GREY, DARK))


def _bicycle(pen: Pen) -> None:
    for x in (-0.55, 0.55):
        pen.line([(x + 0.38 * math.cos(a), 0.35 + 0.38 * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 30)], DARK)
        for a in np.linspace(0, math.pi, 4)[:-1]:
            c, s = 0.36 * math.cos(a), 0.36 * math.sin(a)
            pen.line([(x - c, 0.35 - s), (x + c, 0.35 + s)], GREY, 0.01)
    frame = pen.tone()
    for line in ([(-0.55, 0.35), (-0.2, -0.25), (0.4, -0.25), (0, 0.35), (-0.55, 0.35)], [(0, 0.35), (-0.25, -0.4)],
                 [(0.55, 0.35), (0.38, -0.45), (0.6, -0.5)], [(-0.4, -0.42), (-0.1, -0.42)]):  # fmt: skip
        pen.line(line, frame, 0.05)


THINGS: tuple[Callable[[Pen], None], ...] = (
    _house, _tree, _car, _person, _face, _flower, _fish, _boat, _cat, _dog, _bird, _mug, _umbrella, _snowman, _rocket,
    _aeroplane, _apple, _mushroom, _butterfly, _key, _glasses, _bottle, _chair, _lamp, _bicycle,
)  # fmt: skip
"""Functions that draw a thing each, with a pen in its square."""


def draw_things(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """One to five things on a plain page, a gradient, or a landscape."""
    large = (width * SCALE, height * SCALE)
    kind = rng.random()
    if kind < 0.6:
        tone = (255, 255, 255) if rng.random() < 0.4 else tuple(int(v) for v in rng.integers(0, 256, 3))
        image = Image.new("RGB", large, tone)
    elif kind < 0.85:
        field = fractal(rng, width, height, rng.uniform(1.8, 3))
        image = as_image(coloured(field, palette(rng, 2))).resize(large)
        tone = image.resize((1, 1)).getpixel((0, 0))
    else:
        image = draw_landscape(rng, width, height).resize(large)
        tone = image.resize((1, 1)).getpixel((0, 0))
    filled = rng.random() < 0.75
    dark, light = (25, 25, 30), (240, 240, 240)
    line = dark if sum(tone) > 330 else light
    ink = line if not filled or rng.random() < 0.5 else None
    count = int(rng.choice((1, 1, 1, 2, 2, 3, 4, 5)))
    columns = math.ceil(math.sqrt(count * width / height))
    rows = math.ceil(count / columns)
    cell = min(large[0] / columns, large[1] / rows)
    canvas = ImageDraw.Draw(image)
    for i in range(count):
        x = (i % columns + rng.uniform(0.4, 0.6)) * large[0] / columns
        y = (i // columns + rng.uniform(0.4, 0.6)) * large[1] / rows
        size = cell * rng.uniform(0.28, 0.5)
        width_of_line = max(2, round(size * rng.uniform(0.012, 0.05)))
        pen = Pen(canvas, rng, x, y, size, rng.random() < 0.5, filled, ink, width_of_line)
        THINGS[rng.integers(len(THINGS))](pen)
    return image.reduce(SCALE)

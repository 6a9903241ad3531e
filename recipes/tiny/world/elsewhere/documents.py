"""Documents that the synthetic world lacks: plots of lines and points, pies, tables, maps, pages, mazes, diagrams."""

import itertools
import math

import numpy as np
from PIL import Image, ImageDraw

from recipes.tiny.world.draw import FONTS, font_of_size
from recipes.tiny.world.elsewhere.textures import as_image, palette

Tone = tuple[int, int, int]
SYLLABLES = "an be co da el fi go he in jo ka la mo ne or pa qu re so ta um ve wi yo ze ch st er ing ed".split()  # noqa: SIM905


def _page(rng: np.random.Generator, width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw, Tone]:
    """An empty page, its canvas, and the tone of the ink."""
    dark = rng.random() < 0.2
    page = rng.integers(10, 60, 3) if dark else rng.integers(225, 256, 3)
    if rng.random() < 0.4:
        page[:] = 255 if not dark else 15
    image = Image.new("RGB", (width, height), tuple(int(v) for v in page))
    return image, ImageDraw.Draw(image), (225, 225, 225) if dark else (30, 30, 35)


def _tone(rng: np.random.Generator) -> Tone:
    return tuple(int(v) for v in rng.integers(0, 230, 3))


def _words(rng: np.random.Generator, count: int) -> str:
    return " ".join("".join(rng.choice(SYLLABLES, rng.integers(1, 5))) for _ in range(count))


def draw_lines(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A plot of one to four lines, or of points, with axes."""
    image, canvas, ink = _page(rng, width, height)
    left, top, right, bottom = 0.12 * width, 0.08 * height, 0.95 * width, 0.86 * height
    if rng.random() < 0.5:
        for i in range(1, 6):
            y = top + (bottom - top) * i / 6
            canvas.line((left, y, right, y), fill=(150, 150, 150))
    canvas.line((left, top, left, bottom, right, bottom), fill=ink, width=2)
    font = font_of_size(FONTS[rng.integers(len(FONTS))], max(8, height // 22))
    for i in range(5):
        canvas.text((left - 3, bottom - (bottom - top) * i / 4), str(i * int(rng.integers(1, 9))), ink, font, "rm")
        canvas.text((left + (right - left) * i / 4, bottom + 3), str(i), ink, font, "mt")
    points = rng.random() < 0.35
    for _ in range(int(rng.integers(1, 5))):
        count, tone = int(rng.integers(6, 60)), _tone(rng)
        walk = np.cumsum(rng.normal(rng.uniform(-0.3, 0.3), 1, count))
        walk = (walk - walk.min()) / max(np.ptp(walk), 1e-9) * rng.uniform(0.3, 0.95)
        x = left + (right - left) * np.linspace(0.02, 0.98, count)
        y = bottom - (bottom - top) * walk
        if points:
            y += rng.normal(0, 0.05, count) * (bottom - top)
            radius = rng.uniform(1.5, 4)
            for a, b in zip(x, y, strict=True):
                canvas.ellipse((a - radius, b - radius, a + radius, b + radius), fill=tone)
        else:
            canvas.line([*zip(x, y, strict=True)], fill=tone, width=int(rng.integers(1, 5)), joint="curve")
    return image


def draw_pie(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A pie chart of three to eight slices, or a ring of them."""
    image, canvas, ink = _page(rng, width, height)
    parts = rng.dirichlet(np.full(int(rng.integers(3, 9)), 3.0)) * 360
    radius = min(width, height) * rng.uniform(0.33, 0.46)
    x, y = width / 2 + rng.uniform(-0.05, 0.05) * width, height / 2
    start = rng.uniform(0, 360)
    for part in parts:
        box = (x - radius, y - radius, x + radius, y + radius)
        canvas.pieslice(box, start, start + part, fill=_tone(rng), outline=ink if rng.random() < 0.5 else None)
        start += part
    if rng.random() < 0.3:
        hole = radius * 0.5
        canvas.ellipse((x - hole, y - hole, x + hole, y + hole), fill=image.getpixel((0, 0)))
    return image


def draw_table(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A table of small numbers and words."""
    image, canvas, ink = _page(rng, width, height)
    rows, columns = int(rng.integers(5, 14)), int(rng.integers(3, 8))
    font = font_of_size(FONTS[rng.integers(len(FONTS))], max(8, int(0.55 * height / rows)))
    shaded = rng.random() < 0.5
    for row in range(rows):
        y = height * (row + 0.5) / rows
        if shaded and row % 2:
            canvas.rectangle((0, y - height / rows / 2, width, y + height / rows / 2), fill=(200, 210, 225))
        for column in range(columns):
            text = _words(rng, 1)[:6] if row == 0 or column == 0 else f"{rng.uniform(0, 100):.{rng.integers(3)}f}"
            canvas.text((width * (column + 0.5) / columns, y), text, (30, 30, 35) if shaded else ink, font, "mm")
    for row in range(rows + 1):
        canvas.line((0, height * row / rows, width, height * row / rows), fill=(140, 140, 140))
    for column in range(columns + 1) if rng.random() < 0.6 else ():
        canvas.line((width * column / columns, 0, width * column / columns, height), fill=(140, 140, 140))
    return image


def draw_map(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Countries with borders and roads."""
    count = int(rng.integers(6, 30))
    sites = rng.uniform(0, 1, (count, 2)) * (height, width)
    y, x = np.mgrid[:height, :width].astype(float)
    y += 6 * np.sin(x / rng.uniform(5, 25))
    x += 6 * np.sin(y / rng.uniform(5, 25))
    nearest = np.argmin((y[..., None] - sites[:, 0]) ** 2 + (x[..., None] - sites[:, 1]) ** 2, axis=-1)
    pixels = palette(rng, count)[nearest]
    border = np.zeros((height, width), bool)
    border[1:] |= nearest[1:] != nearest[:-1]
    border[:, 1:] |= nearest[:, 1:] != nearest[:, :-1]
    pixels[border] = (60, 60, 60)
    image = as_image(pixels)
    canvas = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(0, 7))):
        road = [(rng.uniform(0, width), rng.uniform(0, height)) for _ in range(4)]
        canvas.line(road, fill=_tone(rng), width=int(rng.integers(1, 4)), joint="curve")
    font = font_of_size(FONTS[0], max(8, height // 25))
    for _ in range(int(rng.integers(0, 9))):
        canvas.text((rng.uniform(0, 0.8) * width, rng.uniform(0, 0.95) * height), _words(rng, 1), (20, 20, 20), font)
    return image


def draw_text(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A page full of small text, in one or two columns, at times with a heading and a picture."""
    image, canvas, ink = _page(rng, width, height)
    lines = int(rng.integers(9, 30))
    font = font_of_size(FONTS[rng.integers(len(FONTS))], max(7, int(0.75 * height / lines)))
    columns = int(rng.integers(1, 3))
    picture = (0.5 * width, 0.3 * height, 0.95 * width, 0.6 * height) if rng.random() < 0.3 else None
    for column in range(columns):
        left = width * (column / columns + 0.04)
        room = width / columns * rng.uniform(0.85, 0.92)
        for line in range(1, lines - 1):
            if rng.random() < 0.08:
                continue
            text = _words(rng, 14)
            while font.getlength(text) > room:
                text = text[:-3]
            canvas.text((left, height * line / lines), text, ink, font)
    if picture:
        canvas.rectangle(picture, fill=_tone(rng))
    return image


def draw_maze(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A maze, made by a depth-first walk through all cells."""
    image, canvas, ink = _page(rng, width, height)
    cell = int(rng.integers(9, 26))
    columns, rows = max(4, width // cell), max(4, height // cell)
    stack, seen = [(0, 0)], {(0, 0)}
    way = max(2, cell // 2)
    while stack:
        x, y = stack[-1]
        free = [(x + a, y + b) for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1))
                if 0 <= x + a < columns and 0 <= y + b < rows and (x + a, y + b) not in seen]  # fmt: skip
        if not free:
            stack.pop()
            continue
        following = free[rng.integers(len(free))]
        ends = [((place[0] + 0.5) * cell, (place[1] + 0.5) * cell) for place in ((x, y), following)]
        canvas.line(ends, fill=ink, width=way)
        seen.add(following)
        stack.append(following)
    return image


def draw_code(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A pattern like a QR code or a bar code."""
    image, canvas, ink = _page(rng, width, height)
    if rng.random() < 0.25:
        x = 0.08 * width
        while x < 0.9 * width:
            bar = rng.uniform(0.005, 0.025) * width
            canvas.rectangle((x, 0.15 * height, x + bar, 0.8 * height), fill=ink)
            x += bar + rng.uniform(0.005, 0.025) * width
        return image
    cells = int(rng.integers(13, 34))
    side = 0.9 * min(width, height) / cells
    left, top = (width - side * cells) / 2, (height - side * cells) / 2
    filled = rng.random((cells, cells)) < 0.5
    for row, column in ((0, 0), (0, cells - 7), (cells - 7, 0)):
        filled[row : row + 7, column : column + 7] = True
        filled[row + 1 : row + 6, column + 1 : column + 6] = False
        filled[row + 2 : row + 5, column + 2 : column + 5] = True
    for row, column in np.argwhere(filled):
        x, y = left + column * side, top + row * side
        canvas.rectangle((x, y, x + side, y + side), fill=ink)
    return image


def draw_diagram(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Boxes with small texts and arrows, as in papers and on screens."""
    image, canvas, ink = _page(rng, width, height)
    font = font_of_size(FONTS[rng.integers(len(FONTS))], max(7, height // int(rng.integers(18, 30))))
    columns, rows = int(rng.integers(2, 5)), int(rng.integers(2, 6))
    centres = []
    for column in range(columns):
        for row in range(rows):
            if rng.random() < 0.2:
                continue
            x, y = width * (column + 0.5) / columns, height * (row + 0.5) / rows
            wide, high = width / columns * rng.uniform(0.3, 0.45), height / rows * rng.uniform(0.2, 0.4)
            box = (x - wide, y - high, x + wide, y + high)
            canvas.rounded_rectangle(box, min(wide, high) * rng.uniform(0, 0.6), fill=_tone(rng), outline=ink)
            canvas.text((x, y), _words(rng, 1), (250, 250, 250), font, "mm")
            centres.append((x, y + high))
    for (a, b), (c, d) in itertools.pairwise(centres):
        canvas.line((a, b, c, d), fill=ink, width=int(rng.integers(1, 3)))
        turn = math.atan2(d - b, c - a)
        head = [(c - 6 * math.cos(turn + side), d - 6 * math.sin(turn + side)) for side in (-0.5, 0.5)]
        canvas.polygon([(c, d), *head], fill=ink)
    return image


DOCUMENTS = (draw_lines, draw_lines, draw_pie, draw_table, draw_map, draw_text, draw_maze, draw_code, draw_diagram)
"""Painters of documents."""

"""Scenes with the statistics of photographs: overlapping shaded things, landscapes, close-ups, rooms."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from recipes.tiny.world.elsewhere.textures import as_image, coloured, fractal, grain, palette


def _light(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A smoothly varying brightness for each pixel, about 0.4 to 1.3: [height, width, 1]."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    angle = rng.uniform(0, 2 * np.pi)
    slope = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
    return (0.9 + slope * rng.uniform(0, 0.9) + 0.25 * (fractal(rng, width, height, 1.8) - 0.5))[..., None]


def _polygon(rng: np.random.Generator, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """An irregular outline around a point, long or round."""
    count = int(rng.integers(3, 10))
    angles = np.sort(rng.uniform(0, 2 * np.pi, count))
    stretch, turn = rng.uniform(0.25, 1), rng.uniform(0, np.pi)
    points = []
    for angle, far in zip(angles, radius * rng.uniform(0.6, 1.2, count), strict=True):
        a, b = np.cos(angle) * far, np.sin(angle) * far * stretch
        points.append((x + a * np.cos(turn) - b * np.sin(turn), y + a * np.sin(turn) + b * np.cos(turn)))
    return points


def draw_dead_leaves(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Overlapping shaded, textured things of all sizes, large ones rare (Lee, Mumford and Huang 2001)."""
    tones = palette(rng, int(rng.integers(3, 9)))
    image = as_image(coloured(fractal(rng, width, height, 1.3), tones))
    texture = (fractal(rng, width, height, rng.uniform(0.7, 1.3))[..., None] - 0.5) * rng.uniform(20, 130)
    layers = int(rng.integers(2, 5))
    for layer in range(layers):
        canvas = ImageDraw.Draw(image)
        for _ in range(int(rng.integers(5, 70))):
            radius = max(width, height) * 0.02 * rng.uniform(0.02, 1) ** -0.7
            x, y = rng.uniform(0, width), rng.uniform(0, height)
            tone = tuple(int(v) for v in np.clip(tones[rng.integers(len(tones))] + rng.normal(0, 18, 3), 0, 255))
            if rng.random() < 0.3:
                stretch = rng.uniform(0.4, 1)
                canvas.ellipse((x - radius, y - radius * stretch, x + radius, y + radius * stretch), fill=tone)
            else:
                canvas.polygon(_polygon(rng, x, y, radius), fill=tone)
        # Things that are farther away are less sharp.
        image = image.filter(ImageFilter.GaussianBlur((layers - layer - 1) * rng.uniform(0.5, 2) + rng.uniform(0.2, 1)))
    pixels = (np.asarray(image, float) + texture) * _light(rng, width, height)
    return as_image(grain(rng, pixels, rng.uniform(0, 8)))


def _ridge(rng: np.random.Generator, width: int, rough: float) -> np.ndarray:
    """A line of hills, [width], 0 to 1."""
    frequency = np.fft.rfftfreq(width) * width
    frequency[0] = 1
    values = np.fft.irfft(np.fft.rfft(rng.standard_normal(width)) / frequency**rough, width)
    return (values - values.min()) / max(np.ptp(values), 1e-9)


def draw_landscape(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A sky with clouds and sun over hills, water, fields or a city."""
    y = np.linspace(0, 1, height)[:, None]
    zenith, horizon = (
        ((40, 90, 170), (190, 215, 240)), ((15, 20, 50), (230, 130, 80)), ((120, 130, 145), (200, 205, 210)),
        ((5, 8, 25), (30, 40, 80)), ((90, 150, 215), (240, 245, 250)), ((60, 30, 70), (250, 190, 120)),
    )[rng.integers(6)]  # fmt: skip
    zenith, horizon = (np.clip(np.array(tone) + rng.normal(0, 18, 3), 0, 255) for tone in (zenith, horizon))
    pixels = np.broadcast_to((zenith + (horizon - zenith) * y[..., None]), (height, width, 3)).copy()
    clouds = np.clip((fractal(rng, width, height, rng.uniform(1.1, 1.7)) - rng.uniform(0.3, 0.8)) * 3, 0, 1)[..., None]
    pixels += clouds * rng.uniform(0.2, 0.95) * (rng.uniform(170, 255) - pixels)
    rows, columns = np.mgrid[:height, :width]
    if rng.random() < 0.35:
        far = np.hypot(columns - rng.uniform(0, width), rows - rng.uniform(0, 0.5) * height) / max(width, height)
        glow = np.exp(-far * rng.uniform(5, 25))[..., None]
        pixels += glow * (np.array((255, 240, 190)) - pixels)
    line = rng.uniform(0.25, 0.7)
    layers = int(rng.integers(1, 5))
    near = np.clip(
        palette(rng, 1)[0] * 0.6 + np.array(((20, 60, 15), (60, 45, 25), (30, 40, 60))[rng.integers(3)]), 0, 255
    )
    for layer in range(layers):
        part = (layer + 1) / layers
        top = line + 0.12 * layer - _ridge(rng, width, rng.uniform(1, 1.8)) * rng.uniform(0.02, 0.3)
        if rng.random() < 0.15:  # a city
            blocks = rng.uniform(0, 0.3, width // max(4, width // 25) + 2)
            top = line + 0.08 * layer - blocks[np.arange(width) // max(4, width // 25)]
        inside = rows >= top * height
        tone = horizon + (near - horizon) * part**0.7 + rng.normal(0, 10, 3)
        ground = tone + (fractal(rng, width, height, rng.uniform(0.7, 1.5))[..., None] - 0.5) * 90 * part
        pixels = np.where(inside[..., None], ground, pixels)
    if rng.random() < 0.25:  # water with waves
        shore = rng.uniform(max(line, 0.5), 0.9)
        waves = 0.5 + 0.5 * np.sin(rows / rng.uniform(1, 4) + 6 * fractal(rng, width, height, 1.4))
        water = zenith * 0.7 + waves[..., None] * rng.uniform(10, 70)
        pixels = np.where((rows >= shore * height)[..., None], water, pixels)
    return as_image(grain(rng, pixels, rng.uniform(0, 6)))


def draw_close_up(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Something near in front of something blurred: a flower, an animal's coat, fruit, a stone."""
    pixels = coloured(fractal(rng, width, height, rng.uniform(1.6, 2.4)), palette(rng, 4))
    y, x = np.mgrid[:height, :width] / max(width, height)
    for _ in range(int(rng.integers(1, 4))):
        a, b = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8) * height / width
        angle = np.arctan2(y - b, x - a)
        far = np.hypot(x - a, y - b)
        petals = rng.integers(0, 14)
        wobble = rng.uniform(0, 0.35) * np.cos(petals * angle + rng.uniform(0, 6)) + 0.25 * (
            fractal(rng, width, height, 1.6) - 0.5
        )
        radius = rng.uniform(0.12, 0.42) * (1 + wobble)
        inside = np.clip((radius - far) / rng.uniform(0.004, 0.05), 0, 1)[..., None]
        values = 0.5 + 0.5 * np.sin(far * rng.uniform(4, 50) + rng.uniform(0, 3) * np.cos(petals * angle))
        values = 0.6 * values + 0.4 * fractal(rng, width, height, rng.uniform(0.6, 1.3))
        shade = 1.15 - 0.8 * (far / radius.clip(0.05)) ** 2 * rng.uniform(0.2, 1)
        pixels += inside * (coloured(values, palette(rng, 4)) * shade[..., None] - pixels)
    pixels *= _light(rng, width, height)
    return as_image(grain(rng, pixels, rng.uniform(0, 8)))


def draw_room(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Walls, boxes, windows and shelves under uneven light, in perspective."""
    image = as_image(np.broadcast_to(palette(rng, 1)[0], (height, width, 3)))
    canvas = ImageDraw.Draw(image)
    x, y = rng.uniform(0.2, 0.8) * width, rng.uniform(0.3, 0.7) * height
    tones = [tuple(int(v) for v in tone) for tone in palette(rng, 9)]
    corners = [(0, 0), (width, 0), (width, height), (0, height)]
    for i in range(4):  # walls, floor and ceiling towards a point
        canvas.polygon([corners[i], corners[(i + 1) % 4], (x, y)], fill=tones[i])
    inner = rng.uniform(0.2, 0.6)
    back = [(x + (a - x) * inner, y + (b - y) * inner) for a, b in corners]
    canvas.polygon(back, fill=tones[4])
    for _ in range(int(rng.integers(4, 22))):
        left, top = rng.uniform(0, width), rng.uniform(0, height)
        wide, high = rng.uniform(0.03, 0.35) * width, rng.uniform(0.03, 0.4) * height
        slant = rng.uniform(-0.25, 0.25) * high
        tone = tones[rng.integers(len(tones))]
        box = [(left, top), (left + wide, top + slant), (left + wide, top + high + slant), (left, top + high)]
        canvas.polygon(box, fill=tone)
        side = tuple(int(0.6 * v) for v in tone)
        deep = [(a + wide / 4, b - wide / 6) for a, b in box[1:3]]
        canvas.polygon([box[1], *deep, box[2]], fill=side)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 2)))
    texture = (fractal(rng, width, height, 1)[..., None] - 0.5) * rng.uniform(10, 60)
    pixels = (np.asarray(image, float) + texture) * _light(rng, width, height)
    return as_image(grain(rng, pixels, rng.uniform(0, 10)))


SCENES = (draw_dead_leaves, draw_dead_leaves, draw_landscape, draw_landscape, draw_close_up, draw_room)
"""Painters of scenes."""

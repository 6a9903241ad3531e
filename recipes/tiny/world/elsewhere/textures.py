"""Textures without anything in them: fractal noise, marble, weaves, plain noise."""

import numpy as np
from PIL import Image, ImageFilter


def fractal(rng: np.random.Generator, width: int, height: int, exponent: float) -> np.ndarray:
    """Noise whose amplitude falls with frequency to the power of `exponent`: about 1 in photographs.

    Returns:
        float64 [height, width], 0 to 1
    """
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**exponent
    spectrum[0, 0] = 0
    values = np.fft.irfft2(spectrum, (height, width))
    low, high = np.percentile(values, (1, 99))
    return np.clip((values - low) / max(high - low, 1e-9), 0, 1)


def palette(rng: np.random.Generator, count: int) -> np.ndarray:
    """Tones that go together as those of a photograph do: of few hues, seldom saturated.

    Returns:
        float64 [count, 3], 0 to 255
    """
    base = rng.uniform(20, 235, 3)
    base = base.mean() + (base - base.mean()) * rng.uniform(0.1, 0.8)
    light = rng.uniform(-1, 1, (count, 1)) * rng.uniform(30, 120)
    hues = rng.normal(0, rng.choice((6, 15, 30, 80)), (count, 3))
    return np.clip(base + light + hues, 0, 255)


def coloured(values: np.ndarray, tones: np.ndarray) -> np.ndarray:
    """Values from 0 to 1 as tones of a palette, interpolated.

    Returns:
        float64 [height, width, 3]
    """
    places = np.linspace(0, 1, len(tones))
    return np.stack([np.interp(values, places, tones[:, band]) for band in range(3)], axis=-1)


def as_image(pixels: np.ndarray) -> Image.Image:
    """Values [height, width, 3], 0 to 255, as an image."""
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def grain(rng: np.random.Generator, pixels: np.ndarray, deviation: float) -> np.ndarray:
    """The values with noise such as a camera's."""
    return pixels + rng.normal(0, deviation, pixels.shape[:2])[..., None]


def draw_fractal(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Clouds of colour."""
    exponent = rng.uniform(0.6, 1.7)
    pixels = coloured(fractal(rng, width, height, exponent), palette(rng, rng.integers(2, 6)))
    if rng.random() < 0.5:
        own = np.stack([fractal(rng, width, height, exponent) for _ in range(3)], axis=-1)
        pixels += (own - 0.5) * rng.uniform(20, 160)
    return as_image(pixels)


def draw_marble(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Wood, marble, sand, water: bent stripes."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    angle = rng.uniform(0, np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    if rng.random() < 0.35:
        along = np.hypot(x - rng.uniform(-0.3, 1.3), y - rng.uniform(-0.3, 1.3))
    bent = along * rng.uniform(4, 30) + fractal(rng, width, height, rng.uniform(1.2, 2)) * rng.uniform(0.5, 4)
    values = 0.5 + 0.5 * np.sin(2 * np.pi * bent)
    values = 0.75 * values + 0.25 * fractal(rng, width, height, 0.7)
    return as_image(grain(rng, coloured(values, palette(rng, 4)), rng.uniform(0, 8)))


def draw_weave(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Cloth, bricks, gravel: something repeated with variations."""
    y, x = np.mgrid[:height, :width].astype(float)
    x += (fractal(rng, width, height, 1.5) - 0.5) * rng.uniform(0, 30)
    y += (fractal(rng, width, height, 1.5) - 0.5) * rng.uniform(0, 30)
    size = rng.uniform(8, 45)
    rows = np.floor(y / (size * rng.uniform(0.4, 1)))
    offset = rng.choice((0, 0.5, 0.3)) * (rows % 2)
    columns = np.floor(x / size + offset)
    lightness = np.sin(rows * 12.9898 + columns * 78.233 + rng.uniform(0, 9)) * 43758.5453 % 1
    edge = np.minimum((x / size + offset) % 1, (y / size) % 1) < rng.uniform(0.03, 0.15)
    pixels = coloured(0.3 + 0.6 * lightness - 0.3 * edge, palette(rng, 4))
    pixels += (fractal(rng, width, height, 0.8)[..., None] - 0.5) * rng.uniform(20, 90)
    return as_image(grain(rng, pixels, rng.uniform(0, 10)))


def draw_noise(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """White, coloured, coarse, or salt and pepper noise."""
    kind = rng.integers(4)
    if kind == 0:
        return as_image(rng.uniform(0, 255, (height, width, 3)))
    if kind == 1:
        return as_image(np.repeat(rng.uniform(0, 255, (height, width, 1)), 3, axis=2))
    if kind == 2:
        cell = rng.integers(2, 12)
        small = rng.uniform(0, 255, (-(-height // cell), -(-width // cell), 3))
        return as_image(small.repeat(cell, 0).repeat(cell, 1)[:height, :width])
    pixels = coloured(fractal(rng, width, height, 1.2), palette(rng, 3))
    spots = rng.random((height, width))
    share = rng.uniform(0.05, 0.3)
    pixels[spots < share] = 0
    pixels[spots > 1 - share] = 255
    return as_image(pixels)


def draw_bokeh(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A view out of focus: soft spots and a few lights."""
    pixels = coloured(fractal(rng, width, height, rng.uniform(1.6, 2.6)), palette(rng, 4))
    y, x = np.mgrid[:height, :width]
    for _ in range(rng.integers(0, 40)):
        radius = rng.uniform(0.015, 0.12) * max(width, height)
        far = np.hypot(x - rng.uniform(0, width), y - rng.uniform(0, height))
        inside = np.clip((radius - far) / rng.uniform(1, 6), 0, 1)[..., None]
        pixels += inside * rng.uniform(0.1, 0.6) * (palette(rng, 1) + 60 - pixels)
    image = as_image(grain(rng, pixels, rng.uniform(0, 4)))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3)))


TEXTURES = (draw_fractal, draw_fractal, draw_marble, draw_weave, draw_noise, draw_bokeh)
"""Painters of textures; the last one's look more like photographs."""

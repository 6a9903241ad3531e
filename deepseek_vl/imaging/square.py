"""Resizing a picture to fit a square, and centring it there."""

from dataclasses import dataclass

from PIL import Image

from deepseek_vl.imaging.open import to_rgb


@dataclass(frozen=True)
class Square:
    """The square that a model sees. A picture that already has this form is not changed.

    Attributes:
        side: side of the square in pixels.
        min_size: a picture's shorter side is never resized below this.
        background: RGB colour of the border of a picture that is not square.
    """

    side: int
    min_size: int
    background: tuple[int, int, int]

    def resized(self, pil_img: Image.Image) -> Image.Image:
        """A picture of any size and mode in RGB, its longer side `side` pixels.

        Raises:
            ValueError: if it has no pixels.
        """
        if not pil_img.width or not pil_img.height:
            raise ValueError(f"The image has no pixels: {pil_img.width}x{pil_img.height}.")
        # Truncation, in this order of operations, is what the published models were trained with.
        width, height = (max(int(length / max(pil_img.size) * self.side), self.min_size) for length in pil_img.size)
        return resize_bicubic(to_rgb(pil_img), width, height)

    def of(self, pil_img: Image.Image) -> Image.Image:
        """A picture resized and centred on the square; raises as `resized`."""
        return expand2square(self.resized(pil_img), self.background)


def expand2square(pil_img: Image.Image, background_color: tuple[int, int, int]) -> Image.Image:
    """The image centred on a square of its longer side, the rest filled with `background_color`."""
    width, height = pil_img.size
    if width == height:
        return pil_img
    side = max(width, height)
    square = Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return square


def resize_bicubic(pil_img: Image.Image, width: int, height: int) -> Image.Image:
    """Pillow's antialiased bicubic resize, with the same result in every version of Pillow.

    Pillow resizes one axis at a time and rounds to 8 bits in between. Which axis is first depends on its version. This
    function follows Pillow 13, with which the golden outputs were made.
    """
    shrink_x, shrink_y = pil_img.width - width, pil_img.height - height
    vertical_first = shrink_y > 0 and shrink_y > 2 * shrink_x
    between = (pil_img.width, height) if vertical_first else (width, pil_img.height)
    for size in (between, (width, height)):
        if pil_img.size != size:
            pil_img = pil_img.resize(size, Image.Resampling.BICUBIC)
    return pil_img

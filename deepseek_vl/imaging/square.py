"""Resizing a picture, and centring it on a square."""

from PIL import Image


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

    Pillow resizes one axis at a time and rounds to 8 bits in between. Which axis is first depends on its version; here
    it is Pillow 13's choice, which the golden outputs were made with.
    """
    for size in resize_steps(pil_img.size, (width, height)):
        if pil_img.size != size:
            pil_img = pil_img.resize(size, Image.Resampling.BICUBIC)
    return pil_img


def resize_steps(old: tuple[int, int], new: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The (width, height) after the first axis is resized, and after both are."""
    shrink_x, shrink_y = old[0] - new[0], old[1] - new[1]
    vertical_first = shrink_y > 0 and shrink_y > 2 * shrink_x
    return ((old[0], new[1]) if vertical_first else (new[0], old[1])), new

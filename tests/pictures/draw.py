"""Draws the test pictures of this directory, by other means than Pillow: SVG, cairo, matplotlib, and numpy alone.

Needs cairosvg (it brings cairocffi), matplotlib, and the fonts Liberation, Roboto, Open Sans, FreeFont, Comic Neue and
Lobster Two where fontconfig finds them; the pictures kept here were drawn once, and the tests only read them.
Run as `python draw.py [directory]`; Pillow only encodes the files.
"""

import io
import math
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import cairocffi as cairo
import cairosvg
import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import font_manager, patches

Points = list[tuple[float, float]]


def star_points(x: float, y: float, radius: float, inner: float = 0.4, turn: float = 0.0) -> Points:
    """The ten corners of a five-pointed star, its first tip upwards, turned by `turn` degrees."""
    corners = []
    for i in range(10):
        length = radius if i % 2 == 0 else radius * inner
        angle = math.radians(36 * i - 90 + turn)
        corners.append((x + length * math.cos(angle), y + length * math.sin(angle)))
    return corners


def star(x: float, y: float, radius: float, fill: str, inner: float = 0.4, turn: float = 0.0) -> str:
    """A star as an SVG polygon."""
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in star_points(x, y, radius, inner, turn))
    return f'<polygon points="{points}" fill="{fill}"/>'


def heart(x: float, y: float, size: float, fill: str) -> str:
    """A heart as an SVG path."""
    path = "M0 -22 C-10 -52 -52 -46 -50 -12 C-48 14 -18 30 0 50 C18 30 48 14 50 -12 C52 -46 10 -52 0 -22 Z"
    return f'<path d="{path}" transform="translate({x} {y}) scale({size / 100})" fill="{fill}"/>'


# name: (width, height, the SVG's inside)
SVG: dict[str, tuple[int, int, str]] = {
    # ---- shapes
    "night.png": (
        320,
        240,
        """<linearGradient id="g" x1="0" y1="0" x2="0" y2="1"><stop offset="0" stop-color="#0b1d4d"/>
        <stop offset="1" stop-color="#3d4f8f"/></linearGradient><rect width="320" height="240" fill="url(#g)"/>
        <circle cx="58" cy="187" r="36" fill="#ffffff"/>"""
        + star(260, 54, 42, "#ffd21f", 0.42, 8),
    ),
    "tiles.png": (
        400,
        400,
        """<rect width="400" height="400" fill="#ececec"/>
        <path d="M0 100H400M0 200H400M0 300H400M100 0V400M200 0V400M300 0V400" stroke="#dcdcdc" stroke-width="2"/>
        <circle cx="82" cy="84" r="48" fill="#d11f2a"/><rect x="272" y="38" width="92" height="92" fill="#1757c2"/>
        <polygon points="84,262 140,358 28,358" fill="#1f9d3a"/>
        <polygon points="318,252 366,318 318,384 270,318" fill="#ff8a00"/>""",
    ),
    "hearts.png": (
        300,
        200,
        """<radialGradient id="g"><stop offset="0" stop-color="#fffafc"/><stop offset="1" stop-color="#f6dbe6"/>
        </radialGradient><rect width="300" height="200" fill="url(#g)"/>"""
        + heart(52, 48, 62, "#e01b24")
        + heart(150, 58, 70, "#e01b24")
        + heart(66, 146, 66, "#e01b24")
        + heart(244, 148, 74, "#7d2ae8"),
    ),
    "flag_cross.png": (
        360,
        240,
        """<rect width="360" height="240" fill="#d8232a"/>
        <path d="M158 48h44v50h50v44h-50v50h-44v-50h-50v-44h50z" fill="#fff"/>""",
    ),
    "rings.png": (
        480,
        320,
        """<rect width="480" height="320" fill="#f7f7f2"/><g fill="none" stroke-width="14">
        <circle cx="80" cy="78" r="50" stroke="#0b74d1"/><circle cx="240" cy="78" r="50" stroke="#111"/>
        <circle cx="400" cy="78" r="50" stroke="#dc2436"/><circle cx="160" cy="236" r="50" stroke="#f5b800"/>
        <circle cx="320" cy="236" r="50" stroke="#0d9648"/></g>""",
    ),
    "traffic.jpg": (
        240,
        360,
        """<rect width="240" height="360" fill="#b9d7ea"/><rect x="62" y="12" width="116" height="336" rx="22"
        fill="#4a4f55"/><circle cx="120" cy="68" r="43" fill="#e8202a"/><circle cx="120" cy="180" r="43"
        fill="#ffd400"/><circle cx="120" cy="292" r="43" fill="#17b04b"/>""",
    ),
    "kite.png": (
        260,
        390,
        """<linearGradient id="g" x1="0" y1="0" x2="0" y2="1"><stop offset="0" stop-color="#8cc8f0"/>
        <stop offset="1" stop-color="#e4f4fd"/></linearGradient><rect width="260" height="390" fill="url(#g)"/>
        <polygon points="204,14 250,78 204,142 158,78" fill="#6a1fb5"/>
        <path d="M204 142C190 210 232 260 205 390" stroke="#777" stroke-width="2" fill="none"/>
        <circle cx="46" cy="62" r="32" fill="#ffd900"/><polygon points="68,284 122,372 14,372" fill="#d62a1e"/>""",
    ),
    "wood.jpg": (
        500,
        350,
        """<rect width="500" height="350" fill="#ead8b7"/><g fill="#e2cca4"><rect y="50" width="500" height="50"/>
        <rect y="150" width="500" height="50"/><rect y="250" width="500" height="50"/></g>
        <circle cx="412" cy="262" r="46" fill="none" stroke="#1466d6" stroke-width="26"/>
        <rect x="36" y="124" width="104" height="104" fill="#121212" transform="rotate(4 88 176)"/>"""
        + heart(252, 70, 100, "#cf1028"),
    ),
    "winter.png": (
        280,
        400,
        """<rect width="280" height="400" fill="#23406e"/><g fill="#8fa3c4"><circle cx="30" cy="40" r="2"/>
        <circle cx="75" cy="120" r="2"/><circle cx="240" cy="30" r="2"/><circle cx="225" cy="130" r="2"/>
        <circle cx="30" cy="210" r="2"/><circle cx="250" cy="230" r="2"/><circle cx="140" cy="375" r="2"/></g>
        <polygon points="140,132 232,306 48,306" fill="#27b34a"/><circle cx="48" cy="358" r="27" fill="#ee2d36"/>
        <circle cx="232" cy="358" r="27" fill="#ee2d36"/>"""
        + star(140, 66, 48, "#ffd429", 0.5),
    ),
    # ---- two pictures
    "pair_a1.png": (
        320,
        240,
        '<rect width="320" height="240" fill="#fbf3dd"/><circle cx="240" cy="128" r="56" fill="#d9202b"/>'
        + star(88, 122, 64, "#1b54cf", 0.38),
    ),
    "pair_a2.png": (
        240,
        240,
        '<rect width="240" height="240" fill="#dfe7ee"/><rect x="28" y="138" width="78" height="78" fill="#1d9440"/>'
        + star(172, 72, 52, "#d9202b", 0.45, -10),
    ),
    # ---- signs
    "stop.png": (
        300,
        300,
        """<rect width="300" height="300" fill="#cfe3f1"/><polygon fill="#c8141e" stroke="#fff" stroke-width="6"
        points="98,24 202,24 276,98 276,202 202,276 98,276 24,202 24,98"/>
        <text x="150" y="177" font-family="Roboto Condensed" font-weight="bold" font-size="88" fill="#fff"
        text-anchor="middle" letter-spacing="2">STOP</text>""",
    ),
    "exit.jpg": (
        420,
        280,
        """<rect width="420" height="280" fill="#d9d4cb"/><rect x="40" y="50" width="340" height="170" rx="14"
        fill="#0a7d3b"/><text x="210" y="175" font-family="Liberation Sans" font-weight="bold" font-size="116"
        fill="#fff" text-anchor="middle">EXIT</text>""",
    ),
    "sale.png": (
        320,
        360,
        """<rect width="320" height="360" fill="#86c5d8"/><rect x="24" y="24" width="272" height="312" rx="10"
        fill="#fff8d6"/><text x="160" y="148" font-family="Open Sans" font-weight="bold" font-size="98"
        fill="#d3161f" text-anchor="middle">SALE</text><text x="160" y="300" font-family="Open Sans"
        font-weight="bold" font-size="140" fill="#111" text-anchor="middle">50</text>""",
    ),
    "open.png": (
        360,
        260,
        """<rect width="360" height="260" fill="#9fb7a5"/><path d="M180 12L90 70M180 12L270 70" stroke="#555"
        stroke-width="3"/><rect x="36" y="66" width="288" height="166" rx="18" fill="#fffdf6"/>
        <text x="180" y="184" font-family="Lobster Two" font-weight="bold" font-size="118" fill="#c81d25"
        text-anchor="middle">Open</text>""",
    ),
    "plaque.png": (
        240,
        200,
        """<rect width="240" height="200" fill="#d8b49a"/><g fill="#cfa78b"><rect y="38" width="240" height="4"/>
        <rect y="78" width="240" height="4"/><rect y="118" width="240" height="4"/><rect y="158" width="240"
        height="4"/></g><ellipse cx="120" cy="100" rx="106" ry="84" fill="#123f8c"/><text x="120" y="145"
        font-family="FreeSerif" font-weight="bold" font-size="132" fill="#fff" text-anchor="middle">42</text>""",
    ),
    "plate.png": (
        450,
        300,
        """<linearGradient id="g" x1="0" y1="0" x2="1" y2="0"><stop offset="0" stop-color="#9aa3ab"/>
        <stop offset="1" stop-color="#c3cad0"/></linearGradient><rect width="450" height="300" fill="url(#g)"/>
        <rect x="30" y="86" width="390" height="132" rx="12" fill="#ffd93b" stroke="#222" stroke-width="5"/>
        <text x="225" y="196" font-family="Liberation Mono" font-weight="bold" font-size="128" fill="#0c0c0c"
        text-anchor="middle">7315</text>""",
    ),
    "hello.png": (
        400,
        270,
        """<rect width="400" height="270" fill="#fff"/><path d="M0 50H400M0 100H400M0 150H400M0 200H400M0 250H400"
        stroke="#d5e3ee" stroke-width="2"/><path d="M38 0V270" stroke="#f0c4c4" stroke-width="2"/>
        <text x="215" y="180" font-family="Comic Neue" font-weight="bold" font-size="138" fill="#1c4fd0"
        text-anchor="middle">hello</text>""",
    ),
    "menu.png": (
        300,
        400,
        """<rect width="300" height="400" fill="#fdf6e3"/><rect x="12" y="12" width="276" height="376" fill="none"
        stroke="#b59f7a" stroke-width="3"/><g font-family="Liberation Serif" font-weight="bold" font-size="98"
        text-anchor="middle"><text x="150" y="122" fill="#c9141f">Tea</text><text x="150" y="238"
        fill="#1546c4">Milk</text><text x="150" y="352" fill="#6c1fb0">Cake</text></g>""",
    ),
    "win.png": (
        360,
        300,
        """<linearGradient id="g" x1="0" y1="0" x2="1" y2="1"><stop offset="0" stop-color="#0e2a4f"/>
        <stop offset="1" stop-color="#27507f"/></linearGradient><rect width="360" height="300" fill="url(#g)"/>
        <text x="180" y="266" font-family="Roboto" font-weight="bold" font-size="128" fill="#fff"
        text-anchor="middle">WIN</text>"""
        + star(180, 84, 68, "#ffcf1a", 0.4),
    ),
    # ---- bar charts
    "chart_arrows.png": (
        300,
        300,
        """<rect width="300" height="300" fill="#fff"/><rect x="52" y="168" width="40" height="92" fill="#f58a07"/>
        <rect x="107" y="60" width="40" height="200" fill="#1d5fd1"/><rect x="162" y="120" width="40" height="140"
        fill="#161616"/><rect x="217" y="212" width="40" height="48" fill="#d4202c"/>
        <path d="M36 22V260H284M30 32L36 20L42 32M274 254L286 260L274 266" fill="none" stroke="#444"
        stroke-width="3"/>""",
    ),
    "chart_two.png": (
        240,
        330,
        """<rect width="240" height="330" fill="#eef1f4"/><path d="M30 60H220M30 120H220M30 180H220M30 240H220"
        stroke="#bcc4cc" stroke-width="2" stroke-dasharray="6 5"/><rect x="52" y="160" width="58" height="140"
        fill="#7422b8"/><rect x="140" y="48" width="58" height="252" fill="#f9c80e"/>
        <path d="M30 24V300H224" fill="none" stroke="#333" stroke-width="2"/>""",
    ),
}


def encoded(data: bytes, name: str) -> bytes:
    """A PNG's bytes as a small file of the kind that `name` tells; a PNG over 12 kB has a palette."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    out = io.BytesIO()
    if name.endswith(".jpg"):
        image.save(out, "JPEG", quality=85)
        return out.getvalue()
    image.save(out, "PNG", optimize=True)
    if len(out.getvalue()) > 12000:
        out = io.BytesIO()
        image.quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def svg(width: int, height: int, inside: str) -> bytes:
    """An SVG as a PNG's bytes."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
    return cairosvg.svg2png(bytestring=f"{head}{inside}</svg>".encode())


def rgb(code: str) -> tuple[float, float, float]:
    """The parts of "#rrggbb", each from 0 to 1."""
    return int(code[1:3], 16) / 255, int(code[3:5], 16) / 255, int(code[5:7], 16) / 255


def canvas(width: int, height: int, *fills: str) -> tuple[cairo.ImageSurface, cairo.Context]:
    """A cairo picture, filled with one colour or with two from top to bottom."""
    surface = cairo.ImageSurface(cairo.FORMAT_RGB24, width, height)
    context = cairo.Context(surface)
    gradient = cairo.LinearGradient(0, 0, 0, height)
    gradient.add_color_stop_rgb(0, *rgb(fills[0]))
    gradient.add_color_stop_rgb(1, *rgb(fills[-1]))
    context.set_source(gradient)
    context.paint()
    return surface, context


def polygon(context: cairo.Context, points: Points) -> None:
    """A closed path through `points`."""
    context.new_path()
    for point in points:
        context.line_to(*point)
    context.close_path()


def arc_heart(context: cairo.Context, x: float, y: float, r: float) -> None:
    """A heart's path: two half circles over a tip."""
    context.new_path()
    context.move_to(x, y + 1.7 * r)
    context.curve_to(x - 0.7 * r, y + 1.0 * r, x - 2 * r, y + 0.5 * r, x - 2 * r, y - 0.5 * r)
    context.arc(x - r, y - 0.5 * r, r, math.pi, 2 * math.pi)
    context.arc(x + r, y - 0.5 * r, r, math.pi, 2 * math.pi)
    context.curve_to(x + 2 * r, y + 0.5 * r, x + 0.7 * r, y + 1.0 * r, x, y + 1.7 * r)
    context.close_path()


def write(context: cairo.Context, text: str, x: float, y: float, size: float, font: str, colour: str) -> None:
    """A bold word, its middle at `x`, its base line at `y`."""
    context.select_font_face(font, cairo.FONT_SLANT_NORMAL, cairo.FONT_WEIGHT_BOLD)
    context.set_font_size(size)
    left, _, width, *_ = context.text_extents(text)
    context.move_to(x - left - width / 2, y)
    context.set_source_rgb(*rgb(colour))
    context.show_text(text)


def png(surface: cairo.ImageSurface) -> bytes:
    """A cairo picture as a PNG's bytes."""
    out = io.BytesIO()
    surface.write_to_png(out)
    return out.getvalue()


def stickers() -> bytes:
    """Five stickers with white rims on a dotted page."""
    surface, c = canvas(600, 400, "#d9cdb8")
    c.set_source_rgb(*rgb("#cfc2aa"))
    for x in range(20, 600, 40):
        for y in range(20, 400, 40):
            c.arc(x, y, 3, 0, 2 * math.pi)
            c.fill()

    def stick(colour: str) -> None:
        c.set_line_join(cairo.LINE_JOIN_ROUND)
        c.set_source_rgb(1, 1, 1)
        c.set_line_width(10)
        c.stroke_preserve()
        c.set_source_rgb(*rgb(colour))
        c.fill()

    polygon(c, star_points(100, 84, 66, 0.45, 12))
    stick("#d41b2c")
    c.arc(502, 78, 50, 0, 2 * math.pi)
    stick("#1a63d8")
    arc_heart(c, 302, 196, 36)
    stick("#1a9a42")
    polygon(c, [(44, 282), (146, 270), (158, 370), (56, 382)])
    stick("#7a27c0")
    polygon(c, [(502, 266), (566, 376), (438, 376)])
    stick("#f98309")
    return png(surface)


def badges() -> bytes:
    """Two yellow stars and a white ring on a dark gradient."""
    surface, c = canvas(420, 300, "#5a1236", "#8c2b58")
    c.set_source_rgb(*rgb("#ffd325"))
    for x, y, turn in ((76, 66, -15), (342, 232, 15)):
        polygon(c, star_points(x, y, 50, 0.5, turn))
        c.fill()
    c.set_source_rgb(1, 1, 1)
    c.set_line_width(20)
    c.arc(210, 150, 44, 0, 2 * math.pi)
    c.stroke()
    return png(surface)


def pair_b1() -> bytes:
    """A purple heart and a yellow ring."""
    surface, c = canvas(300, 300, "#cfd8dc", "#eceff1")
    arc_heart(c, 86, 86, 32)
    c.set_source_rgb(*rgb("#6d24b3"))
    c.fill()
    c.set_source_rgb(*rgb("#f2b705"))
    c.set_line_width(22)
    c.arc(214, 220, 44, 0, 2 * math.pi)
    c.stroke()
    return png(surface)


def pair_b2() -> bytes:
    """A purple heart and an orange cross."""
    surface, c = canvas(330, 220, "#f4efe6")
    arc_heart(c, 250, 110, 34)
    c.set_source_rgb(*rgb("#8130cc"))
    c.fill()
    c.set_source_rgb(*rgb("#fb7a0c"))
    c.rectangle(56, 56, 30, 106)
    c.rectangle(18, 94, 106, 30)
    c.fill()
    return png(surface)


def score() -> bytes:
    """A scoreboard with two numbers."""
    surface, c = canvas(480, 320, "#6f7a80")
    c.set_source_rgb(*rgb("#0d0d0f"))
    c.rectangle(18, 40, 444, 240)
    c.fill()
    c.set_source_rgb(*rgb("#3a3a3e"))
    c.rectangle(262, 56, 4, 208)
    c.fill()
    write(c, "12", 140, 226, 180, "Liberation Mono", "#ff2f2f")
    write(c, "8", 364, 226, 180, "Liberation Mono", "#ffe13a")
    return png(surface)


def bus() -> bytes:
    """A bus stop's board: a word over a number."""
    surface, c = canvas(260, 380, "#dcebf2", "#b7d0dc")
    c.set_source_rgb(*rgb("#8a8f94"))
    c.rectangle(122, 300, 16, 80)
    c.fill()
    c.set_source_rgb(*rgb("#ffffff"))
    c.rectangle(22, 22, 216, 290)
    c.fill()
    write(c, "BUS", 130, 140, 104, "Roboto", "#0f8a3c")
    write(c, "23", 130, 284, 136, "Roboto", "#f07800")
    return png(surface)


def bars(c: cairo.Context, base: float, left: float, width: float, step: float, heights: dict[str, float]) -> None:
    """Bars side by side on a base line."""
    for i, (colour, height) in enumerate(heights.items()):
        c.rectangle(left + i * step, base - height, width, height)
        c.set_source_rgb(*rgb(colour))
        c.fill()


def chart_slide() -> bytes:
    """Three bars on a white card."""
    surface, c = canvas(450, 300, "#3d6b7d", "#2c4f5e")
    c.set_source_rgb(1, 1, 1)
    c.rectangle(24, 22, 402, 256)
    c.fill()
    c.set_source_rgb(*rgb("#d4d9dc"))
    for y in range(60, 240, 45):
        c.rectangle(60, y, 340, 2)
        c.fill()
    bars(c, 246, 92, 64, 106, {"#d8222f": 96, "#1a5cc8": 48, "#1b9e45": 178})
    c.set_source_rgb(*rgb("#333333"))
    c.rectangle(56, 246, 348, 3)
    c.rectangle(56, 40, 3, 208)
    c.fill()
    return png(surface)


def chart_poll() -> bytes:
    """Five thin bars on a pale gradient."""
    surface, c = canvas(320, 320, "#fff6e8", "#ffe6c7")
    tall = {"#1f8f3f": 120, "#d3202b": 176, "#121212": 88, "#6a25b8": 244, "#1d64d6": 40}
    bars(c, 288, 40, 36, 52, tall)
    c.set_source_rgb(*rgb("#6b5a45"))
    c.rectangle(24, 288, 276, 4)
    c.fill()
    return png(surface)


def figure(width: int, height: int, face: str) -> tuple[plt.Figure, plt.Axes]:
    """A matplotlib picture of this size in pixels with one pair of axes."""
    fig, ax = plt.subplots(figsize=(width / 100, height / 100), dpi=100, facecolor=face)
    return fig, ax


def page(width: int, height: int, face: str) -> tuple[plt.Figure, plt.Axes]:
    """A matplotlib picture whose data units are pixels, the origin at the bottom left, without axes."""
    fig, ax = figure(width, height, face)
    ax.set_position((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    return fig, ax


def saved(fig: plt.Figure) -> bytes:
    """A matplotlib picture as a PNG's bytes."""
    out = io.BytesIO()
    fig.savefig(out, format="png")
    plt.close(fig)
    return out.getvalue()


def patches_picture() -> bytes:
    """Two circles and a cross in a row."""
    fig, ax = page(450, 300, "#e9eef5")
    ax.add_patch(patches.Circle((75, 150), 58, color="darkorange"))
    ax.add_patch(patches.Circle((225, 150), 58, color="forestgreen"))
    ax.add_patch(patches.Rectangle((357, 90), 36, 120, color="black"))
    ax.add_patch(patches.Rectangle((315, 132), 120, 36, color="black"))
    return saved(fig)


def markers() -> bytes:
    """Four big scatter markers on a light grid."""
    fig, ax = figure(360, 360, "white")
    ax.set_position((0.03, 0.03, 0.94, 0.94))
    ax.set(xlim=(0, 6), ylim=(0, 6), xticks=range(7), yticks=range(7), xticklabels=[], yticklabels=[])
    ax.grid(color="0.88")
    ax.set_axisbelow(True)
    for x, y, marker, colour in ((1, 5, "^", "purple"), (5, 5, "P", "crimson"), (1, 1, "D", "royalblue")):
        ax.scatter([x], [y], s=2600 if marker != "D" else 1700, marker=marker, color=colour)
    ax.scatter([5], [3], s=3200, marker="*", color="black")
    return saved(fig)


def pair_d1() -> bytes:
    """A green triangle and an orange square."""
    fig, ax = page(240, 300, "#fdfdfd")
    ax.add_patch(patches.Polygon([(30, 178), (138, 178), (84, 276)], color="green"))
    ax.add_patch(patches.Rectangle((132, 26), 84, 84, color="darkorange"))
    return saved(fig)


def pair_d2() -> bytes:
    """A green triangle and a black star."""
    fig, ax = page(360, 240, "#d5e8d9")
    ax.add_patch(patches.Polygon([(238, 66), (346, 66), (292, 166)], color="seagreen"))
    ax.add_patch(patches.Polygon([(x, 240 - y) for x, y in star_points(96, 118, 66)], color="black"))
    return saved(fig)


def year() -> bytes:
    """A number of four digits."""
    fig, ax = page(360, 240, "#f1e8fa")
    font = font_manager.FontProperties(family="Open Sans", weight="bold", size=88)
    ax.text(180, 116, "1984", ha="center", va="center", color="#7420bd", fontproperties=font)
    return saved(fig)


def days() -> bytes:
    """Three words, one under the other, on stripes."""
    fig, ax = page(300, 360, "white")
    rows = (("MON", "#16a34a", 300), ("TUE", "#dc1f1f", 180), ("WED", "#1d4fd8", 60))
    for i, (word, colour, y) in enumerate(rows):
        ax.add_patch(patches.Rectangle((0, y - 60), 300, 120, color="#f3f3ee" if i % 2 else "#e4e4dc", linewidth=0))
        font = font_manager.FontProperties(family="FreeSans", weight=600, size=60)
        ax.text(150, y - 3, word, ha="center", va="center", color=colour, fontproperties=font)
    return saved(fig)


def chart_plain() -> bytes:
    """Three bars as matplotlib draws them."""
    fig, ax = figure(400, 300, "white")
    ax.bar([1, 2, 3], [4, 7, 2], color=["tab:blue", "tab:orange", "tab:green"])
    return saved(fig)


def chart_grid() -> bytes:
    """Five bars before grid lines."""
    fig, ax = figure(480, 320, "white")
    ax.bar(range(5), [3.1, 8.2, 5, 1.5, 6.5], color=["red", "gold", "green", "blue", "purple"], width=0.7)
    ax.grid(axis="y")
    ax.set_axisbelow(True)
    ax.set(xticks=[], yticks=[2, 4, 6, 8], yticklabels=[])
    return saved(fig)


def chart_dark() -> bytes:
    """Four bars on black."""
    with plt.style.context("dark_background"):
        fig, ax = figure(360, 270, "black")
        ax.bar(range(4), [5.4, 3.4, 1.2, 7.6], color=["white", "red", "yellow", "limegreen"], width=0.6)
        ax.set(xticks=[], yticks=[])
        ax.spines[["top", "right"]].set_visible(False)
        return saved(fig)


def array_png(pixels: np.ndarray) -> bytes:
    """An RGB array of bytes as a PNG's bytes."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1).astype(np.uint8)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def plane(width: int, height: int, colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A plain array and its pixels' rows and columns."""
    y, x = np.mgrid[:height, :width]
    return np.full((height, width, 3), colour, np.uint8), y, x


def pixels() -> bytes:
    """A square, a ring and a triangle with hard edges."""
    a, y, x = plane(256, 192, (120, 165, 190))
    a[14:70, 16:72] = (205, 25, 30)
    far = np.hypot(x - 208, y - 148)
    a[(far < 34) & (far > 19)] = (255, 255, 255)
    a[(y > 64) & (y < 122) & (abs(x - 128) < (y - 64) * 0.6)] = (15, 15, 15)
    return array_png(a)


def pair_c1() -> bytes:
    """A black diamond and an orange circle on grain."""
    a, y, x = plane(300, 200, (222, 214, 196))
    grain = np.random.default_rng(3).integers(-7, 8, (200, 300, 1))
    a = (a + grain).astype(np.uint8)
    a[abs(x - 72) / 44 + abs(y - 100) / 60 < 1] = (18, 18, 20)
    a[np.hypot(x - 226, y - 100) < 48] = (250, 130, 10)
    return array_png(a)


def pair_c2() -> bytes:
    """A white diamond and a red square on a gradient."""
    a, y, x = plane(240, 240, (0, 0, 0))
    a[..., 1] = 90 + y // 6
    a[..., 2] = 110 + y // 6
    a[abs(x - 120) / 42 + abs(y - 60) / 46 < 1] = (255, 255, 255)
    a[146:220, 20:94] = (225, 30, 40)
    return array_png(a)


def go() -> bytes:
    """A word of square dots."""
    letters = (".###..###.", "#....#...#", "#....#...#", "#.##.#...#", "#..#.#...#", "#..#.#...#", ".###..###.")
    a, _, _ = plane(300, 220, (24, 40, 30))
    for row, line in enumerate(letters):
        for column, dot in enumerate(line):
            if dot == "#":
                left = 22 + 24 * column + (16 if column > 4 else 0)
                a[26 + 24 * row : 46 + 24 * row, left : left + 20] = (60, 220, 90)
    return array_png(a)


def chart_blocks() -> bytes:
    """Four bars with hard edges."""
    a, _, _ = plane(240, 160, (250, 250, 245))
    a[20:140:20] = (215, 215, 210)
    heights = (((20, 150, 60), 62), ((20, 20, 20), 24), ((250, 140, 0), 88), ((30, 80, 210), 120))
    for i, (colour, height) in enumerate(heights):
        a[142 - height : 142, 30 + 52 * i : 64 + 52 * i] = colour
    a[142:145, 14:232] = a[10:145, 14:17] = (90, 90, 90)
    return array_png(a)


DRAWN: dict[str, Callable[[], bytes]] = {
    "stickers.png": stickers,
    "badges.png": badges,
    "patches.png": patches_picture,
    "markers.png": markers,
    "pixels.png": pixels,
    "pair_b1.png": pair_b1,
    "pair_b2.png": pair_b2,
    "pair_c1.jpg": pair_c1,
    "pair_c2.png": pair_c2,
    "pair_d1.png": pair_d1,
    "pair_d2.png": pair_d2,
    "score.png": score,
    "bus.png": bus,
    "year.png": year,
    "days.png": days,
    "go.png": go,
    "chart_plain.png": chart_plain,
    "chart_grid.png": chart_grid,
    "chart_dark.jpg": chart_dark,
    "chart_slide.png": chart_slide,
    "chart_poll.png": chart_poll,
    "chart_blocks.png": chart_blocks,
}


def main(directory: Path) -> None:
    """Draws every picture into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, (width, height, inside) in SVG.items():
        (directory / name).write_bytes(encoded(svg(width, height, inside), name))
    for name, drawn in DRAWN.items():
        (directory / name).write_bytes(encoded(drawn(), name))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

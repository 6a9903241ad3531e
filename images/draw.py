"""Draw the sample pictures of this repository: the training diagram, a dog in four outfits, and a toy world.

Run as ``python images/draw.py``; the PNG files are written beside this script. Only Pillow is needed. Every picture is
drawn at ``SCALE`` times its size in coordinates of the final picture and reduced on saving, for smooth edges.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]
Box = tuple[float, float, float, float]

SCALE = 4
FOLDER = Path(__file__).resolve().parent

DIAGRAM_SIZE = (1400, 620)
DOG_SIZE = (480, 480)
TOY_SIZE = (480, 360)

INK = {  # colours of the diagram
    "page": "#F7F8FB",
    "panel": "#FFFFFF",
    "panel edge": "#D9DEE8",
    "text": "#1E2A3E",
    "muted": "#5E6B80",
    "arrow": "#7A869A",
    "brand": "#3D5AFE",
    "on brand": "#FFFFFF",
    "group": "#F4F6FA",
    "group edge": "#B9C3D3",
    "data": "#EEF0FF",
    "data edge": "#A9B3F2",
    "frozen": "#E1EEF9",
    "frozen edge": "#7FAED6",
    "frozen icon": "#3C86C4",
    "trained": "#FFE7D3",
    "trained edge": "#EE9147",
    "trained icon": "#E8641B",
    "trained glow": "#FFC857",
}

FUR = {  # colours of the dog and of what it wears
    "line": "#4A2F22",
    "coat": "#DB9A55",
    "coat dark": "#8F5732",
    "cream": "#FFF1DB",
    "nose": "#33231D",
    "nose shine": "#7A6A63",
    "tongue": "#F08A8F",
    "tongue dark": "#D0656E",
    "cheek": "#EDB07A",
    "white": "#FFFFFF",
    "gold": "#F7C948",
    "santa": "#D6323A",
    "santa dark": "#B0222C",
    "snow": "#FDFDFB",
    "snow shade": "#DDE4EA",
    "robe": "#5A45A0",
    "robe dark": "#45337F",
    "glass": "#22252E",
    "glint": "#6E7A90",
}


@dataclass(frozen=True)
class Stage:
    """One training stage: its texts, the modules it trains and the data it reads."""

    title: str
    goal: str
    trained: frozenset[str]
    data: tuple[str, ...]
    data_label: str


STAGES = (
    Stage(
        "Training VL Adaptor",
        "Link visual features to the language space",
        frozenset({"adaptor"}),
        ("Image-text pairs",),
        "Training data",
    ),
    Stage(
        "Joint VL Pre-training",
        "Learn vision and keep the language skills",
        frozenset({"adaptor", "llm"}),
        ("Vision-language data", "Language-only data"),
        "Training data, interleaved",
    ),
    Stage(
        "Supervised Fine-tuning",
        "Follow instructions and hold a dialogue",
        frozenset({"siglip", "adaptor", "llm"}),
        ("VL chat data", "Language-only chat data"),
        "Training data, mixed",
    ),
)


class Sketch:
    """A canvas that takes coordinates of the final picture and draws them enlarged, ``lift`` pixels higher."""

    def __init__(self, size: tuple[int, int], color: str) -> None:
        self.image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), color)
        self.pen = ImageDraw.Draw(self.image)
        self.lift = 0.0

    def save(self, name: str) -> None:
        """Write the picture, reduced to its final size, beside this script."""
        self.image.reduce(SCALE).save(FOLDER / name, optimize=True)

    def place(self, points: Iterable[Point]) -> list[Point]:
        """Return where ``points`` of the final picture lie on the enlarged canvas."""
        return [(x * SCALE, (y - self.lift) * SCALE) for x, y in points]

    def ellipse(self, box: Box, fill: str, edge: str | None = None, width: float = 0) -> None:
        """Fill the ellipse inside ``box``, with an edge if one is named."""
        self.pen.ellipse(self.place([box[:2], box[2:]]), fill, edge, round(width * SCALE))

    def disc(self, center: Point, radius: float, fill: str, edge: str | None = None, width: float = 0) -> None:
        """Fill a circle."""
        x, y = center
        self.ellipse((x - radius, y - radius, x + radius, y + radius), fill, edge, width)

    def panel(self, box: Box, radius: float, fill: str, edge: str | None = None, width: float = 1.5) -> None:
        """Fill a rectangle with rounded corners."""
        corners = self.place([box[:2], box[2:]])
        self.pen.rounded_rectangle(corners, radius * SCALE, fill, edge, round(width * SCALE))

    def stroke(self, points: Iterable[Point], color: str, width: float) -> None:
        """Draw a line through ``points`` with round joints and ends."""
        path = self.place(points)
        self.pen.line(path, color, round(width * SCALE))
        for point in path:  # a little smaller than the line, lest rounding leave bumps on its sides
            self.pen.circle(point, width * SCALE / 2 - 1, color)

    def polygon(self, points: Iterable[Point], fill: str, edge: str | None = None, width: float = 0) -> None:
        """Fill a polygon, with a rounded edge if one is named."""
        corners = list(points)
        self.pen.polygon(self.place(corners), fill)
        if edge:
            self.stroke([*corners, corners[0]], edge, width)

    def text(self, at: Point, words: str, size: float, color: str, anchor: str = "mm", bold: bool = False) -> None:
        """Write ``words``; the default font has one weight, so bold text is thickened with a thin stroke."""
        font = ImageFont.load_default(size * SCALE)
        weight = size * SCALE * 0.022 if bold else 0
        self.pen.text(self.place([at])[0], words, color, font, anchor, stroke_width=weight)


def text_width(words: str, size: float) -> float:
    """Return how wide ``words`` come out at ``size``."""
    return ImageFont.load_default(size * SCALE).getlength(words) / SCALE


def smooth(points: list[Point], closed: bool = True, steps: int = 14) -> list[Point]:
    """Return a Catmull-Rom curve through ``points``."""
    count = len(points)
    around = [points[-1], *points, *points[:2]] if closed else [points[0], *points, points[-1]]
    curve = []
    for i in range(count if closed else count - 1):
        p0, p1, p2, p3 = around[i : i + 4]
        for step in range(steps):
            t = step / steps
            weights = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)
            x, y = (sum(w * p[axis] for w, p in zip(weights, (p0, p1, p2, p3), strict=True)) / 2 for axis in (0, 1))
            curve.append((x, y))
    return curve if closed else [*curve, points[-1]]


def star(center: Point, radius: float, turn: float = 0.0, waist: float = 0.45) -> list[Point]:
    """Return the corners of a five-pointed star that stands upright, turned by ``turn`` radians."""
    corners = []
    for i in range(10):
        reach = radius if i % 2 == 0 else radius * waist
        angle = turn - math.pi / 2 + i * math.pi / 5
        corners.append((center[0] + reach * math.cos(angle), center[1] + reach * math.sin(angle)))
    return corners


# ---------------------------------------------------------------------------------------------------------------------
# The training diagram
# ---------------------------------------------------------------------------------------------------------------------


def draw_snowflake(sketch: Sketch, center: Point, radius: float) -> None:
    """Draw the sign of a frozen module."""
    x, y = center
    for i in range(6):
        angle = math.pi / 2 + i * math.pi / 3
        tip = (x + radius * math.cos(angle), y + radius * math.sin(angle))
        sketch.stroke([center, tip], INK["frozen icon"], radius * 0.2)
        fork = (x + radius * 0.5 * math.cos(angle), y + radius * 0.5 * math.sin(angle))
        for side in (-0.8, 0.8):
            twig = (
                fork[0] + radius * 0.4 * math.cos(angle + side),
                fork[1] + radius * 0.4 * math.sin(angle + side),
            )
            sketch.stroke([fork, twig], INK["frozen icon"], radius * 0.16)


def draw_flame(sketch: Sketch, center: Point, radius: float) -> None:
    """Draw the sign of a trained module."""
    x, y = center
    outer = [(0.05, -1.1), (0.5, -0.4), (0.75, 0.25), (0.45, 0.85), (0, 1.0), (-0.45, 0.85), (-0.75, 0.3), (-0.5, -0.2)]
    outer += [(-0.25, -0.1), (-0.1, -0.6)]
    inner = [(0.05, 0.0), (0.32, 0.45), (0.2, 0.8), (0, 0.86), (-0.2, 0.8), (-0.3, 0.5)]
    for shape, color in ((outer, INK["trained icon"]), (inner, INK["trained glow"])):
        sketch.polygon(smooth([(x + radius * dx, y + radius * dy) for dx, dy in shape]), color)


def draw_sign(sketch: Sketch, center: Point, state: str, radius: float = 9) -> None:
    """Draw the sign of a module's ``state``, ``trained`` or ``frozen``."""
    (draw_flame if state == "trained" else draw_snowflake)(sketch, center, radius)


def draw_arrow(sketch: Sketch, start: Point, end: Point, color: str = INK["arrow"]) -> None:
    """Draw a line from ``start`` that ends in an arrow head at ``end``."""
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    ahead, aside = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
    neck = (end[0] - 8 * ahead[0], end[1] - 8 * ahead[1])
    sketch.stroke([start, neck], color, 2)
    wings = [(neck[0] + side * 5 * aside[0], neck[1] + side * 5 * aside[1]) for side in (-1, 1)]
    sketch.polygon([end, *wings], color)


def draw_module(sketch: Sketch, box: Box, name: str, state: str, size: float = 18) -> None:
    """Draw a module of the model: its name and the sign of its state, centred in a box of the state's colour."""
    x0, y0, x1, y1 = box
    sketch.panel(box, 9, INK[state], INK[f"{state} edge"], 2)
    middle, y, gap = (x0 + x1) / 2, (y0 + y1) / 2, 28
    left = middle - (text_width(name, size) + gap) / 2
    draw_sign(sketch, (left + 9, y), state)
    sketch.text((left + gap, y), name, size, INK["text"], "lm", bold=True)


def draw_data(sketch: Sketch, box: Box, stage: Stage) -> None:
    """Draw the group of a stage's data sources."""
    x0, y0, x1, y1 = box
    sketch.panel(box, 11, INK["group"], INK["group edge"])
    sketch.text(((x0 + x1) / 2, y0 + 17), stage.data_label, 14, INK["muted"])
    gap, size = 10, 15
    widths = [text_width(name, size) for name in stage.data]
    spare = (x1 - x0 - gap * (len(widths) + 1) - sum(widths)) / len(widths)
    left = x0 + gap
    for name, width in zip(stage.data, widths, strict=True):
        chip = (left, y0 + 33, left + width + spare, y1 - gap)
        sketch.panel(chip, 8, INK["data"], INK["data edge"])
        sketch.text(((chip[0] + chip[2]) / 2, (chip[1] + chip[3]) / 2), name, size, INK["text"])
        left = chip[2] + gap


def draw_stage(sketch: Sketch, number: int, stage: Stage, box: Box) -> None:
    """Draw the column of one stage: heading, and the model from its data at the bottom up to the LLM."""
    x0, y0, x1, y1 = box
    sketch.panel(box, 16, INK["panel"], INK["panel edge"])
    sketch.panel((x0 + 24, y0 + 26, x0 + 100, y0 + 60), 17, INK["brand"], None)
    sketch.text((x0 + 62, y0 + 43), f"Stage {number}", 16, INK["on brand"], bold=True)
    sketch.text((x0 + 114, y0 + 32), stage.title, 21, INK["text"], "lm", bold=True)
    sketch.text((x0 + 114, y0 + 57), stage.goal, 15, INK["muted"], "lm")

    states = {name: "trained" if name in stage.trained else "frozen" for name in ("sam", "siglip", "adaptor", "llm")}
    left, right, lane = x0 + 24, x1 - 24, x1 - 104
    llm, adaptor = (left, y0 + 90, right, y0 + 146), (left, y0 + 178, lane, y0 + 230)
    encoder, data = (left, y0 + 262, lane, y0 + 360), (left, y0 + 398, right, y1 - 22)

    draw_module(sketch, llm, "DeepSeek LLM", states["llm"], 20)
    draw_module(sketch, adaptor, "Vision-Language Adaptor", states["adaptor"])
    sketch.panel(encoder, 11, INK["group"], INK["group edge"])
    middle = (left + lane) / 2
    sketch.text((middle, encoder[1] + 19), "Hybrid Vision Encoder", 15, INK["muted"])
    top, bottom = encoder[1] + 37, encoder[3] - 12
    draw_module(sketch, (left + 12, top, middle - 6, bottom), "SAM-B", states["sam"], 17)
    draw_module(sketch, (middle + 6, top, lane - 12, bottom), "SigLIP-L", states["siglip"], 17)
    draw_data(sketch, data, stage)

    for lower, upper in ((adaptor[1], llm[3]), (encoder[1], adaptor[3]), (data[1], encoder[3])):
        draw_arrow(sketch, (middle, lower - 3), (middle, upper + 3))
    sketch.text((middle + 14, (data[1] + encoder[3]) / 2), "images", 14, INK["muted"], "lm")
    text_x = (lane + right) / 2 - 12
    draw_arrow(sketch, (text_x, data[1] - 3), (text_x, llm[3] + 3))
    sketch.text((text_x + 12, (data[1] + encoder[3]) / 2), "text", 14, INK["muted"], "lm")


def draw_legend(sketch: Sketch, right: float, y: float) -> None:
    """Draw the meaning of the two box colours, ending at ``right``."""
    x = right
    for state, words in (("trained", "trained in this stage"), ("frozen", "frozen")):
        x -= text_width(words, 16)
        sketch.text((x, y), words, 16, INK["text"], "lm")
        x -= 48
        sketch.panel((x, y - 14, x + 38, y + 14), 7, INK[state], INK[f"{state} edge"], 2)
        draw_sign(sketch, (x + 19, y), state, 8)
        x -= 30


def draw_training_pipelines() -> None:
    """Draw the three training stages side by side."""
    sketch = Sketch(DIAGRAM_SIZE, INK["page"])
    margin, gap, top, bottom = 32, 34, 84, DIAGRAM_SIZE[1] - 28
    sketch.text((margin, 44), "Training pipeline of DeepSeek-VL", 28, INK["text"], "lm", bold=True)
    draw_legend(sketch, DIAGRAM_SIZE[0] - margin, 44)
    width = (DIAGRAM_SIZE[0] - 2 * margin - gap * (len(STAGES) - 1)) / len(STAGES)
    for i, stage in enumerate(STAGES):
        left = margin + i * (width + gap)
        draw_stage(sketch, i + 1, stage, (left, top, left + width, bottom))
        if i:
            draw_arrow(sketch, (left - gap + 5, top + 43), (left - 5, top + 43), INK["brand"])
    sketch.save("training_pipelines.png")


# ---------------------------------------------------------------------------------------------------------------------
# The dog
# ---------------------------------------------------------------------------------------------------------------------

CENTER = DOG_SIZE[0] / 2
LINE = 4.5


def mirror(points: list[Point]) -> list[Point]:
    """Return ``points`` reflected at the picture's vertical middle."""
    return [(2 * CENTER - x, y) for x, y in points]


def symmetric(half: list[Point]) -> list[Point]:
    """Return the closed outline whose right half, from the top down, is ``half``."""
    return half + mirror([point for point in half if point[0] != CENTER])[::-1]


def blob(sketch: Sketch, points: list[Point], fill: str, edge: str | None = FUR["line"], width: float = LINE) -> None:
    """Fill a smooth closed shape through ``points``."""
    sketch.polygon(smooth(points), fill, edge, width)


def both_sides(sketch: Sketch, points: list[Point], fill: str, edge: str | None = FUR["line"]) -> None:
    """Draw a smooth closed shape and its mirror image."""
    for side in (points, mirror(points)):
        blob(sketch, side, fill, edge)


def hair_line(sketch: Sketch, points: list[Point], color: str = FUR["line"], width: float = LINE) -> None:
    """Draw a smooth open line through ``points``."""
    sketch.stroke(smooth(points, closed=False), color, width)


def tube(sketch: Sketch, points: list[Point], color: str, width: float) -> None:
    """Draw a thick smooth line through ``points`` with an edge around it."""
    hair_line(sketch, points, FUR["line"], width + 2 * LINE)
    hair_line(sketch, points, color, width)


def draw_body(sketch: Sketch) -> None:
    """Draw tail, trunk and hind legs."""
    tail = [(318, 408), (368, 396), (392, 352), (384, 318)]
    tube(sketch, tail, FUR["coat"], 24)
    sketch.stroke(smooth(tail, closed=False)[-9:], FUR["cream"], 24)
    trunk = [(240, 256), (298, 278), (330, 340), (338, 404), (306, 438), (240, 442)]
    blob(sketch, symmetric(trunk), FUR["coat"])
    chest = [(240, 268), (284, 296), (284, 348), (240, 384)]
    blob(sketch, symmetric(chest), FUR["cream"], None)
    both_sides(sketch, [(148, 352), (182, 366), (194, 408), (172, 440), (132, 436), (122, 396)], FUR["coat"])
    both_sides(
        sketch, [(106, 436), (122, 415), (156, 411), (184, 424), (186, 446), (150, 453), (114, 451)], FUR["cream"]
    )
    draw_toes(sketch, (126, 142))


def draw_toes(sketch: Sketch, places: tuple[float, float]) -> None:
    """Draw the lines between the toes of a pair of paws, at two places of the left one."""
    for x in places:
        toe = [(x, 440.0), (x, 448.0)]
        for line in (toe, mirror(toe)):
            sketch.stroke(line, FUR["line"], 3)


def draw_front_legs(sketch: Sketch) -> None:
    """Draw the front legs with their paws."""
    both_sides(sketch, [(200, 330), (228, 334), (240, 380), (240, 436), (200, 436), (198, 380)], FUR["coat"], None)
    outer = [(200.0, 338.0), (199.0, 425.0)]
    for line in (outer, mirror(outer), [(CENTER, 374), (CENTER, 425)]):
        sketch.stroke(line, FUR["line"], LINE)
    draw_front_paws(sketch)


def draw_front_paws(sketch: Sketch) -> None:
    """Draw the front paws."""
    both_sides(
        sketch, [(188, 438), (196, 420), (216, 414), (234, 422), (238, 442), (214, 454), (194, 451)], FUR["cream"]
    )
    draw_toes(sketch, (206, 221))


def draw_head(sketch: Sketch) -> None:
    """Draw head, ears and face."""
    skull = [(240, 112), (296, 124), (332, 172), (334, 230), (300, 274), (240, 288)]
    blob(sketch, symmetric(skull), FUR["coat"])
    blob(sketch, [(206, 156), (226, 178), (224, 208), (200, 218), (178, 204), (180, 172)], FUR["coat dark"], None)
    blaze = [(240, 122), (250, 150), (258, 190), (268, 222)]
    blob(sketch, symmetric(blaze), FUR["cream"], None)
    muzzle = [(240, 206), (276, 214), (296, 242), (282, 270), (240, 281)]
    blob(sketch, symmetric(muzzle), FUR["cream"], None)
    both_sides(sketch, [(168, 228), (182, 236), (178, 250), (164, 250), (158, 238)], FUR["cheek"], None)
    both_sides(
        sketch,
        [(186, 126), (146, 124), (112, 156), (96, 212), (104, 258), (130, 268), (150, 232), (160, 178)],
        FUR["coat dark"],
    )
    draw_eyes(sketch)
    draw_mouth(sketch)


def draw_eyes(sketch: Sketch) -> None:
    """Draw the eyes."""
    for x in (203, 277):
        sketch.ellipse((x - 13, 174, x + 13, 204), FUR["nose"])
        sketch.disc((x + 4, 183), 5, FUR["white"])
        sketch.disc((x - 4, 195), 2.5, FUR["white"])


def draw_mouth(sketch: Sketch) -> None:
    """Draw the nose, the smile and the tongue."""
    tongue = [(226, 246), (240, 246), (254, 246), (254, 266), (240, 277), (226, 266)]
    blob(sketch, tongue, FUR["tongue"], FUR["line"], 3.5)
    sketch.stroke([(CENTER, 256), (CENTER, 264)], FUR["tongue dark"], 3)
    smile = smooth([(CENTER, 245), (233, 254), (220, 256), (208, 250), (203, 240)], closed=False)
    for half in (smile, mirror(smile)):
        sketch.polygon([*half, (CENTER, 232)], FUR["cream"])
    for line in ([(CENTER, 230), (CENTER, 245)], smile, mirror(smile)):
        sketch.stroke(line, FUR["line"], LINE)
    blob(sketch, [(217, 217), (240, 211), (263, 217), (260, 230), (240, 241), (220, 230)], FUR["nose"], None)
    sketch.ellipse((226, 215, 244, 222), FUR["nose shine"])


def draw_santa_hat(sketch: Sketch) -> None:
    """Draw a red hat with a white rim and bobble."""
    hat = [(166, 132), (178, 86), (212, 48), (262, 36), (316, 54), (354, 100), (340, 116), (314, 98), (306, 132)]
    blob(sketch, [*hat, (240, 142)], FUR["santa"])
    hair_line(sketch, [(314, 98), (296, 82), (272, 76)], FUR["santa dark"])
    rim = [(158, 140), (196, 128), (240, 124), (284, 128), (322, 140)]
    tube(sketch, rim, FUR["snow"], 34)
    sketch.disc((354, 116), 22, FUR["snow"], FUR["line"], LINE)
    for x, y in ((174, 142), (214, 132), (258, 131), (300, 140), (354, 121)):
        hair_line(sketch, [(x - 9, y), (x, y + 5), (x + 9, y)], FUR["snow shade"])


def draw_robe(sketch: Sketch) -> None:
    """Draw a starry robe with wide sleeves that leaves the paws free."""
    robe = [(240, 258), (302, 280), (346, 346), (365, 412), (350, 432), (240, 440)]
    blob(sketch, symmetric(robe), FUR["robe"])
    draw_front_paws(sketch)
    sleeve = [(204, 312), (228, 328), (237, 372), (240, 412), (212, 422), (178, 414), (186, 364)]
    both_sides(sketch, sleeve, FUR["robe dark"])
    cuff = [(184, 407), (211, 414), (234, 407)]
    for side in (cuff, mirror(cuff)):
        hair_line(sketch, side, FUR["gold"], 8)
    for x, y, radius in ((154, 392, 12), (166, 340, 9), (326, 392, 12), (314, 340, 9), (210, 372, 8), (270, 372, 8)):
        sketch.polygon(star((x, y), radius), FUR["gold"])
    collar = [(170, 278), (204, 298), (240, 304), (276, 298), (310, 278)]
    tube(sketch, collar, FUR["robe dark"], 20)
    sketch.polygon(star((CENTER, 314), 20, waist=0.5), FUR["gold"], FUR["line"], 3.5)


def draw_wizard_hat(sketch: Sketch) -> None:
    """Draw a tall, pointed hat with stars and a moon."""
    sketch.ellipse((104, 112, 376, 166), FUR["robe dark"], FUR["line"], LINE)
    base = [(168, 134), (202, 146), (240, 149), (278, 146), (312, 134)]
    back = smooth([(168, 134), (186, 92), (212, 50), (252, 18), (290, 14)], closed=False)
    front = smooth([(290, 14), (276, 36), (292, 84), (312, 134)], closed=False)
    sketch.polygon([*back, *front, *smooth(base[::-1], closed=False)], FUR["robe"], FUR["line"], LINE)
    band = [(x, y - 6) for x, y in base]
    tube(sketch, band, FUR["gold"], 12)
    for center, radius, turn in (
        ((212, 92), 13, -0.2),
        ((256, 44), 10, 0.3),
        ((234, 64), 5, 0.1),
        ((282, 106), 8, 0.2),
    ):
        sketch.polygon(star(center, radius, turn), FUR["gold"])
    sketch.disc((252, 90), 13, FUR["gold"])
    sketch.disc((258, 86), 11, FUR["robe"])


def draw_sunglasses(sketch: Sketch) -> None:
    """Draw dark glasses with a glint on each lens."""
    temple = [(168.0, 180.0), (157.0, 176.0)]
    for side in (temple, mirror(temple)):
        sketch.stroke(side, FUR["glass"], 8)
    hair_line(sketch, [(222, 182), (240, 176), (258, 182)], FUR["glass"], 8)
    lens = [(164, 172), (196, 168), (228, 174), (230, 194), (212, 213), (182, 211), (165, 194)]
    both_sides(sketch, lens, FUR["glass"], FUR["glass"])
    for x in (182, 258):
        for offset, width in ((0, 7), (14, 4)):
            sketch.stroke([(x + offset, 198), (x + offset + 14, 182)], FUR["glint"], width)


@dataclass(frozen=True)
class Outfit:
    """What a dog wears over its body and on its head, the colours behind it, and by how much it is raised."""

    page: str
    halo: str
    shadow: str
    on_body: Callable[[Sketch], None] | None = None
    on_head: Callable[[Sketch], None] | None = None
    lift: float = 12


OUTFITS = {
    "dog_a.png": Outfit("#F8D9A6", "#FCEBCB", "#E2B877", lift=40),
    "dog_b.png": Outfit("#BFDFCB", "#DFF0E4", "#95C3A6", on_head=draw_santa_hat),
    "dog_c.png": Outfit("#CFC6EE", "#E7E2F8", "#A99CD8", on_body=draw_robe, on_head=draw_wizard_hat, lift=2),
    "dog_d.png": Outfit("#AEDAEF", "#D6EDF8", "#82BEDC", on_head=draw_sunglasses, lift=40),
}


def draw_dog(name: str, outfit: Outfit) -> None:
    """Draw the dog in an outfit, from back to front."""
    sketch = Sketch(DOG_SIZE, outfit.page)
    sketch.disc((CENTER, CENTER), 212, outfit.halo)
    sketch.lift = outfit.lift
    sketch.ellipse((76, 424, 404, 466), outfit.shadow)
    draw_body(sketch)
    draw_front_legs(sketch)
    if outfit.on_body:
        outfit.on_body(sketch)
    draw_head(sketch)
    if outfit.on_head:
        outfit.on_head(sketch)
    sketch.save(name)


def draw_toys() -> None:
    """Draw what the bundled model knows: shapes, a chart, a word."""
    sketch = Sketch(TOY_SIZE, "#F4F1E8")
    sketch.disc((110, 100), 62, "#DC1428")
    sketch.polygon(star((350, 110), 78), "#1E50DC")
    sketch.panel((60, 215, 170, 325), 0, "#00A000")
    sketch.disc((300, 270), 58, "#DC1428")
    sketch.save("shapes.png")

    sketch = Sketch(TOY_SIZE, "#E7EFF8")
    sketch.polygon([(120, 60), (190, 190), (50, 190)], "#F5C800")
    sketch.polygon([(330, 150), (395, 225), (330, 300), (265, 225)], "#8232B4")
    sketch.save("more_shapes.png")

    sketch = Sketch(TOY_SIZE, "#FFFFFF")
    for i, (height, colour) in enumerate(((120, "#DC1428"), (255, "#1E50DC"), (180, "#00A000"), (70, "#FF8C00"))):
        sketch.panel((70 + 95 * i, 320 - height, 135 + 95 * i, 320), 0, colour)
    sketch.stroke([(50, 30), (50, 320), (440, 320)], "#303030", 3)
    sketch.save("chart.png")

    sketch = Sketch(TOY_SIZE, "#FFFFFF")
    sketch.text((240, 180), "HELLO", 110, "#1E50DC", bold=True)
    sketch.save("word.png")


def main() -> None:
    """Draw every picture."""
    draw_toys()
    draw_training_pipelines()
    for name, outfit in OUTFITS.items():
        draw_dog(name, outfit)


if __name__ == "__main__":
    main()

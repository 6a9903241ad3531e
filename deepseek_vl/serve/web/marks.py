"""Invisible marks in texts for Gradio's chat, which renders Markdown, so that none becomes HTML or fetches an image.

A mark stands wherever HTML, an image or a diagram could begin, in code and LaTeX as well, because only the page's own
Markdown parser knows which parts of a text are code. `page.js` removes the marks from what the page shows, and from
what is copied or edited.
"""

import re

MARK = "\u2064"
"""INVISIBLE PLUS, which hardly anyone writes."""

_RISKS = re.compile(
    rf"(?P<own>{MARK})"
    r"|(?<=<)(?=[A-Za-z/!?])"  # a tag, a comment
    r"|(?<=&)(?=#?\w+;)"  # an entity
    r"|(?<=!)(?=\[)"  # an image
    r"|(?<=```)(?=mermaid)"  # a diagram, whose labels may hold HTML
    r"|(?<=%%%)(?=LATEX_BLOCK)|(?<=src=\")(?=/file)"  # what Gradio replaces
)
_IMAGE = re.compile(rf"(!{MARK}\[(?:[^\[\]]|\[[^\[\]]*\])*\])(?=\()")


def marked(text: str) -> str:
    """The text with marks, which `unmarked` removes."""
    text = _RISKS.sub(lambda match: MARK * (2 if match["own"] else 1), text)
    return _IMAGE.sub(rf"\1{MARK}", text)  # or else it would be shown as a link


def unmarked(text: str) -> str:
    """The text without the marks that `marked` inserted."""
    return re.sub(f"{MARK}({MARK}?)", r"\1", text)

"""Text for Gradio's chat, which makes Markdown of it: shown as it was written, and no HTML, whatever it holds.

What could begin HTML, fetch an image or become a diagram gets an invisible mark, in code and LaTeX as well: which parts
of a text are code, only the page's own Markdown parser knows. The page takes the marks out of what it has made, and out
of what is copied or edited (`page.js`).
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
    """The text with marks; `unmarked` takes them out again."""
    text = _RISKS.sub(lambda match: MARK * (2 if match["own"] else 1), text)
    return _IMAGE.sub(rf"\1{MARK}", text)  # or else it would be shown as a link


def unmarked(text: str) -> str:
    """The text that `marked` was given."""
    return re.sub(f"{MARK}({MARK}?)", r"\1", text)

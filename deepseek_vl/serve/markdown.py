"""Making Markdown that models and strangers write harmless."""

import re

_MARKDOWN = re.compile(
    r"(?P<kept>^ {0,3}(?P<fence>```+|~~~+).*?(?:^ {0,3}(?P=fence)|\Z)"  # a block of code
    r"|(?P<ticks>`+).+?(?P=ticks)"  # code in a line
    r"|\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\))"  # LaTeX
    r"|(?P<html>[<&])|(?P<image>!\[)",
    re.DOTALL | re.MULTILINE,
)


def safe_markdown(text: str) -> str:
    """Escape Markdown so that HTML is shown as text, and no image is fetched.

    Code and LaTeX stay as they are.
    """

    def replace(match: re.Match[str]) -> str:
        if match["html"]:
            return {"<": "&lt;", "&": "&amp;"}[match["html"]]
        return "!\\[" if match["image"] else match["kept"]

    return _MARKDOWN.sub(replace, text)

"""Hooks of mkdocs that change pages before they are rendered.

- `<!-- include FILE -->` becomes the content of a file of the repository, such as the README.
- `<!-- file tree -->` becomes tables of the package's files, with their numbers of lines and their docstrings.
- A link to a file that a page includes becomes a link to that page. An image outside this folder is copied. Any other
  link out of this folder, which works only in the repository, becomes plain text.
"""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
INCLUDE = re.compile(r"^<!-- include (\S+) -->$", re.MULTILINE)
FILE_TREE = "<!-- file tree -->"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files, **_: Any) -> str:
    """A page's Markdown after the changes above; mkdocs calls this for each page."""
    here = (DOCS / page.file.src_uri).parent
    included = INCLUDE.fullmatch(markdown.strip())
    if included:
        source = (DOCS / included.group(1)).resolve()
        markdown, here = source.read_text(encoding="utf-8"), source.parent
    markdown = markdown.replace(FILE_TREE, "\n".join(file_tree()))
    pages = included_files()

    def link(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if "://" in path or not path:
            return match.group()
        found = (here / path).resolve()
        if not found.exists():
            raise PluginError(f"{page.file.src_uri}: there is no {path}")
        if found in pages:
            found = pages[found]
        elif not found.is_relative_to(DOCS):
            if not image:
                return text
            copy = str(found.relative_to(ROOT))
            if not files.get_file_from_path(copy):
                files.append(File.generated(config, copy, abs_src_path=str(found)))
            found = DOCS / copy
        written = os.path.relpath(found, (DOCS / page.file.src_uri).parent)
        return f"{image}[{text}]({written}{hash_}{anchor})"

    return LINK.sub(link, markdown)


def included_files() -> dict[Path, Path]:
    """The page that includes each file, by the file's path."""
    found = {}
    for page in DOCS.glob("*.md"):
        if match := INCLUDE.fullmatch(page.read_text(encoding="utf-8").strip()):
            found[(DOCS / match.group(1)).resolve()] = page
    return found


def file_tree() -> Iterator[str]:
    """The lines of Markdown tables of the package's files, one table for each folder."""
    for folder in sorted({file.parent for file in (ROOT / "deepseek_vl").rglob("*.py")}):
        files = [file for file in sorted(folder.glob("*.py")) if file.stat().st_size]
        if not files:
            continue
        yield f"\n### `{folder.relative_to(ROOT)}/`\n"
        yield "| file | lines | what it is |"
        yield "| --- | ---: | --- |"
        for file in files:
            source = file.read_text(encoding="utf-8")
            said = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
            yield f"| `{file.name}` | {len(source.splitlines())} | {said} |"

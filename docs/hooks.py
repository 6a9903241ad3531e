"""What mkdocs does to pages beside rendering them.

- `<!-- include FILE -->` becomes a file of the repository, such as the README.
- `<!-- file tree -->` becomes tables of the package's files, with their lines and what they say of themselves.
- A link to a file that a page includes leads to that page, an image from elsewhere is taken along, and any other link
  out of this folder, which is for those who read the page in the repository, loses its target.
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
    """mkdocs calls this for each page."""
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
    """The files that pages include: file to page."""
    found = {}
    for page in DOCS.glob("*.md"):
        if match := INCLUDE.fullmatch(page.read_text(encoding="utf-8").strip()):
            found[(DOCS / match.group(1)).resolve()] = page
    return found


def file_tree() -> Iterator[str]:
    """Tables in Markdown, one for each folder."""
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

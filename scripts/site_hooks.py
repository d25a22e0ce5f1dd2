"""Hooks of mkdocs: pages from files outside of ``docs/``, pages of notebooks, and links that lead to either.

The files in ``docs/`` are written to be read in the repository too. There a link to ``../CONTRIBUTING.md`` works; on the
website that file is the page ``contributing.md``.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

PAGES: Mapping[str, str] = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""File of the repository → the page that it is on the website."""

FOLDERS = ("configs",)
"""Folders whose files are on the website as they are."""

_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files in ``docs/``."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for path in _others():
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        files.append(
            File.generated(config, f"notebooks/{path.stem}.md", content=notebook_page(notebook, path.name))
        )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 - mkdocs passes them by name
    """Return a page whose links lead to pages of the website."""
    source = page.file.src_uri
    in_repository = {made: file for file, made in PAGES.items()}.get(source, f"docs/{source}")
    return relinked(markdown, in_repository, source)


def relinked(markdown: str, written_in: str, shown_as: str) -> str:
    """Return Markdown with links from a file of the repository turned into links from a page of the website.

    Example:
        >>> relinked("[how](docs/faq.md#which)", "README.md", "index.md")
        '[how](faq.md#which)'
        >>> relinked("[us](../CONTRIBUTING.md)", "docs/design.md", "design.md")
        '[us](contributing.md)'
    """

    def turn(found: re.Match[str]) -> str:
        opening, target, anchor, closing = found.groups()
        if "://" in target or target.startswith("mailto:"):
            return found.group()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(written_in), target))
        place = PAGES.get(path, path.removeprefix("docs/"))
        relative = posixpath.relpath(place, posixpath.dirname(shown_as) or ".")
        return f"{opening}{relative}{anchor or ''}{closing}"

    return _LINK.sub(turn, markdown)


def notebook_page(notebook: Mapping[str, Any], name: str) -> str:
    """Return a notebook as Markdown: its text, its code, and what the code printed where that is stored.

    Args:
        notebook: the parsed ``.ipynb`` file.
        name: the file's name, for a link to it.
    """
    parts = [part for cell in notebook["cells"] for part in _cell(cell)]
    return "\n\n".join([*parts, f"[Download this notebook]({name})"]) + "\n"


def _cell(cell: Mapping[str, Any]) -> Iterator[str]:
    text = "".join(cell["source"]).strip()
    if not text:
        return
    if cell["cell_type"] == "markdown":
        yield text
        return
    yield f"```python\n{text}\n```"
    for output in cell.get("outputs", ()):
        said = output.get("text") or output.get("data", {}).get("text/plain") or ()
        if said:
            yield f"```text\n{''.join(said).rstrip()}\n```"


def _others() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).iterdir()) if path.is_file()]

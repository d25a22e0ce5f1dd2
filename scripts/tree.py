"""The tree of the package for ``docs/design.md``: each folder and module with the first line of its docstring.

Folders stand in the order of the layers that import-linter holds, so that whatever is imported stands below.
"""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lora_merge"
WIDTH = 118
CAPTION_AT = 26
"""Column of the captions; a longer name pushes its own to the right."""


def tree() -> str:
    """Return the tree as a block of Markdown."""
    lines = ["lora_merge/"]
    for place in _in_order():
        lines += _folder(place, 1) if place.is_dir() else _entry(place.name, place, 1)
    return "\n".join(["```text", *lines, "```"])


def _in_order() -> list[Path]:
    """Return what lies in the package, from the top layer down; what no layer names comes last."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    names = [name.strip().rpartition(".")[2] for layer in layers for name in layer.split("|")]
    found = {place.stem: place for place in _members(PACKAGE)}
    first = [found.pop(name) for name in names if name in found]
    return first + [found[name] for name in sorted(found)]


def _members(folder: Path) -> list[Path]:
    """Return the modules and the packages of a folder, modules first."""
    modules = [path for path in folder.glob("*.py") if not path.name.startswith("_")]
    packages = [path for path in folder.iterdir() if (path / "__init__.py").is_file()]
    return sorted(modules) + sorted(packages)


def _folder(folder: Path, depth: int) -> list[str]:
    lines = _entry(f"{folder.name}/", folder / "__init__.py", depth)
    for place in _members(folder):
        lines += _folder(place, depth + 1) if place.is_dir() else _entry(place.name, place, depth + 1)
    return lines


def _entry(name: str, module: Path, depth: int) -> list[str]:
    """Return a name and its caption, folded below itself where it is long."""
    head = f"{'  ' * depth}{name}".ljust(CAPTION_AT - 1) + " "
    inner = " " * max(CAPTION_AT, len(head))
    return textwrap.wrap(_caption(module), WIDTH, initial_indent=head, subsequent_indent=inner) or [
        head.rstrip()
    ]


def _caption(module: Path) -> str:
    """Return the first sentence of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"(?<=[.?!])\s+(?=[A-Z`])", docstring.partition("\n\n")[0].replace("\n", " "))[0]
    return sentence.removesuffix(".").replace("``", "`")

"""The fenced blocks of the documentation, and the marks before them.

A mark is an HTML comment on the line before a block:

- ``<!-- needs: vllm -->``: running it needs something that a test does not have; one or more names of `NEEDS`.
- ``<!-- fails: 5 -->``: its last command ends with this exit code.
- ``<!-- sketch -->``: Python that shows an idea and is not complete. It is compiled, not run.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

NEEDS = {
    "vllm": "an engine that is not installed here",
    "lmdeploy": "an engine that is not installed here",
    "sglang": "an engine that is not installed here",
    "llama.cpp": "programs of llama.cpp",
    "hub": "a download from a hub",
    "store": "an object store, and credentials for it",
    "tinker": "an account at a service",
    "clone": "builds environments in a clone, for minutes",
    "install": "installs packages",
    "docker": "a docker daemon",
    "shell": "changes the start-up of a shell",
    "github": "a workflow of GitHub Actions",
    "cluster": "SLURM, Kubernetes or a store",
    "cron": "a line of cron's table, not of a shell",
    "browser": "opens a browser",
}
"""What a mark may name → why a test does not run the block."""

PROGRAMS = {
    "vllm": ("vllm", "lora-merge"),
    "lmdeploy": ("lmdeploy",),
    "sglang": ("python",),
    "llama.cpp": ("python", "llama-server", "llama-quantize"),
    "tinker": ("tinker",),
    "clone": ("make", "python", ".venv/bin/python", "git"),
    "docker": ("docker", "make"),
}
"""What a mark may name → the programs of which a block has at least one: else the mark hides what can be run."""

_INNER = re.compile(r'"?\$\(([^)]*)\)"?')
_OPERATORS = {"|", ">", ">>", "2>", "<", "&&", "||", ";"}
_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[\w+-]*)[^`\n]*$")
_MARK = re.compile(r"^\s*<!-- (?P<key>needs|fails|sketch)(?:: (?P<value>[^>]*?))? -->\s*$")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """Line of its first fence, from 1."""

    language: str
    text: str
    needs: tuple[str, ...] = ()
    fails: int = 0
    is_sketch: bool = False

    @property
    def place(self) -> str:
        """File and line, for a reader."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a shell block, each as its words, without comments; of a console only what is typed.

        Of a pipeline it is the first command; a command in ``$(…)`` is one by itself.
        """
        if self.language not in {"sh", "console"}:
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        inner = [command for line in lines for command in _INNER.findall(line)]
        found = [
            shlex.split(line, comments=True) for line in (*(_INNER.sub("", line) for line in lines), *inner)
        ]
        return [list(takewhile(lambda word: word not in _OPERATORS, words)) for words in found if words]


def pages() -> list[Path]:
    """Return every page of the documentation that a user reads."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        fence = _FENCE.match(lines[at])
        if fence is None:
            at += 1
            continue
        end = next(n for n in range(at + 1, len(lines)) if lines[n].strip() == fence["ticks"])
        text = "\n".join(lines[at + 1 : end])
        found.append(_block(page, at, fence["language"], text, lines[at - 1] if at else ""))
        at = end + 1
    return found


def _block(page: Path, at: int, language: str, text: str, before: str) -> Block:
    mark = _MARK.match(before)
    key, value = (mark["key"], mark["value"] or "") if mark else ("", "")
    return Block(
        page=page,
        line=at + 1,
        language=language,
        text=text,
        needs=tuple(value.replace(" ", "").split(",")) if key == "needs" else (),
        fails=int(value) if key == "fails" else 0,
        is_sketch=key == "sketch",
    )

"""Wildcards in the paths of a batch: matching directories, and what each wildcard matched."""

from __future__ import annotations

import fnmatch
import glob
import re
from pathlib import Path

from lora_merge.errors import ResolveError
from lora_merge.storage.user_paths import is_directory, user_path

WILD = re.compile(r"[*?\[]")
"""Characters that make a path a pattern."""

_MAX_WILDCARDS = 8
"""Most wildcards of a path. A regex tries every way to divide a name among them, so time grows fast with their number."""


def matches(pattern: str, place: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return the directories that a pattern matches, numbers in numeric order, and what each wildcard matched.

    A weight after the pattern is kept with each match: ``runs/*:0.5``.

    Args:
        pattern: as the user wrote it.
        place: the pattern without its weight.

    Raises:
        ResolveError: it has more than eight wildcards.
    """
    behind = pattern[len(place) :]
    place = str(user_path(place))
    n_wild = len(WILD.findall(place.replace("**", "*")))
    if n_wild > _MAX_WILDCARDS:
        raise ResolveError(f"{pattern}: has {n_wild} wildcards, expected at most {_MAX_WILDCARDS}")
    rule = re.compile(_captured(place))
    found = []
    for path in glob.glob(place, recursive=True):  # noqa: PTH207 - of any root, and ** follows no rule of Path
        match = rule.fullmatch(path.rstrip("/"))
        if match and is_directory(Path(path)):
            found.append((path.rstrip("/") + behind, match.groups("")))
    return sorted(
        found,
        # Numbers as numbers: checkpoint-9 before checkpoint-10.
        key=lambda one: [
            (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", one[0])
        ],
    )


def _captured(pattern: str) -> str:
    """Return a regex that matches the same paths as a glob; each wildcard is a group.

    Example:
        >>> re.fullmatch(_captured("runs/*/checkpoint-*"), "runs/a/checkpoint-10").groups()
        ('a', '10')
    """
    parts = re.split(r"(\*\*/?|\*|\?|\[!?\]?[^\]]*\])", pattern.rstrip("/"))
    return "".join(re.escape(part) if n % 2 == 0 else _group(part) for n, part in enumerate(parts))


def _group(wildcard: str) -> str:
    if wildcard.startswith("**"):
        return "(?:(.*)/)?" if wildcard.endswith("/") else "(.*)"
    if wildcard.startswith("["):
        # Without the \Z that fnmatch adds.
        return f"({fnmatch.translate(wildcard)[:-2]})"
    return "([^/]*)" if wildcard == "*" else "([^/])"

"""Regular expressions of a configuration. Most are names, of which there may be one for each module: those are looked up."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_merge.quantised.method import PatternError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_NAME = re.compile(r"(\^?)((?:[\w/-]|\\\.|\.)+)(\$?)", re.ASCII)
"""A name whose dots are escaped, or are not: no path has another character in the place of a dot."""


def matching(
    expressions: Sequence[str],
    names: Sequence[str],
    match: Callable[[Sequence[str], Sequence[str]], list[list[int]]],
) -> list[list[int]]:
    """Return for each name the places of the expressions that match its beginning, in their order.

    Args:
        expressions: a stranger's.
        names: of modules.
        match: see `Surroundings.match`; it is asked about expressions that are not names.

    Raises:
        PatternError: one cannot be used.

    Example:
        >>> from lora_merge.quantised.method import matched
        >>> matching(["a.b", r"^a\\.b$", ".*c"], ["a.b", "a.b.c", "d"], matched)
        [[0, 1], [0, 2], []]
    """
    whole: dict[str, list[int]] = {}
    starts: dict[str, list[int]] = {}
    others = []
    for at, expression in enumerate(expressions):
        name = _NAME.fullmatch(expression)
        if name is None:
            others.append(at)
        else:
            (whole if name[3] else starts).setdefault(name[2].replace("\\.", "."), []).append(at)
    lengths = sorted({len(start) for start in starts})
    hits = [
        [*whole.get(name, ()), *(at for n in lengths if n <= len(name) for at in starts.get(name[:n], ()))]
        for name in names
    ]
    if not others:
        return [sorted(found) for found in hits]
    try:
        found = match([expressions[at] for at in others], names)
    except PatternError as exc:
        raise PatternError(others[exc.at], str(exc)) from exc
    return [sorted([*hit, *(others[n] for n in more)]) for hit, more in zip(hits, found, strict=True)]

"""``--ignore``: the modules that a user wants left dense."""

from __future__ import annotations

import difflib
import fnmatch
from typing import TYPE_CHECKING

from lora_merge.core.report import Issue, error
from lora_merge.peft_rules.matcher import Matcher, MatcherError
from lora_merge.peft_rules.patterns import LIMIT_SECONDS
from lora_merge.words import choice, quoted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_REGEX = "re:"
_CODE = "ignore"


def ignored_modules(
    patterns: Sequence[str], spellings: Mapping[str, Sequence[str]]
) -> tuple[frozenset[str], list[Issue]]:
    """Return the modules that some patterns name, and what is wrong with the patterns.

    Args:
        patterns: each is compared with whole names: ``*``, ``?`` and ``[…]`` as in a shell, where ``*`` may be any number
            of parts; or ``re:`` and a regular expression for the beginning of a name, as compressed-tensors has it.
        spellings: module → its names: as the checkpoint spells it, and as transformers does.

    Example:
        >>> names = [f"model.layers.{n}.mlp.{one}" for n in range(2) for one in ("up_proj", "down_proj")]
        >>> sorted(ignored_modules(["*.0.*", "re:.*1.*up"], {name: (name,) for name in names})[0])
        ['model.layers.0.mlp.down_proj', 'model.layers.0.mlp.up_proj', 'model.layers.1.mlp.up_proj']
    """
    pairs = [(module, name) for module, names in spellings.items() for name in names]
    hits: list[set[str]] = [set() for _ in patterns]
    issues = []
    for at, pattern in enumerate(patterns):
        if not pattern.startswith(_REGEX):
            hits[at] |= {module for module, name in pairs if fnmatch.fnmatchcase(name, pattern)}
    regexes = [at for at, pattern in enumerate(patterns) if pattern.startswith(_REGEX)]
    try:
        for at, module in _matching([patterns[at].removeprefix(_REGEX) for at in regexes], pairs):
            hits[regexes[at]].add(module)
    except MatcherError as exc:
        return frozenset(), [error(_CODE, patterns[regexes[exc.at]], str(exc), "correct --ignore")]
    for pattern, found in zip(patterns, hits, strict=True):
        if not found:
            issues.append(_unmatched(pattern, [name for _, name in pairs]))
    return frozenset().union(*hits), issues


def _matching(expressions: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[tuple[int, str]]:
    """Return ``(place of the expression, module)`` of all that match.

    Raises:
        MatcherError: an expression cannot be used.
    """
    if not expressions:
        return []
    found = Matcher(expressions, "match", LIMIT_SECONDS).find([name for _, name in pairs])
    return [(at, module) for (module, _), places in zip(pairs, found, strict=True) for at, _ in places]


def _unmatched(pattern: str, names: Sequence[str]) -> Issue:
    """Return the refusal of a pattern that names nothing, with names that are like it."""
    # A last part alone is what most people try first.
    ends = [name for name in names if name.endswith(f".{pattern}")]
    if ends:
        return error(
            _CODE, pattern, "matches no module", f"patterns must match whole names: {quoted(f'*.{pattern}')}"
        )
    near = difflib.get_close_matches(pattern, dict.fromkeys(names), n=3, cutoff=0.4)
    hint = (
        f"did you mean {choice(near)}?"
        if near
        else "only linear layers can be named; '*.o_proj', for example, is each layer's"
    )
    return error(_CODE, pattern, "matches no module of the output", hint)

"""Modules that a configuration leaves dense, in the three languages in which the methods list them."""

from __future__ import annotations

import fnmatch
import re
from typing import TYPE_CHECKING, Literal

from lora_merge.quantised.matching import matching
from lora_merge.quantised.method import PatternError
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lora_merge.quantised.method import Surroundings

Language = Literal["names", "targets", "wildcards"]
"""Names or regexes of modules, which take everything below them along (transformers, ``should_convert_module``); full names,
``re:…`` and classes (compressed-tensors); wildcards (ModelOpt)."""

_PLAIN = re.compile(r"[\w./-]*", re.ASCII)
"""An entry that can only be a name, although its dots could be any character."""

_BEGINNING = re.compile(r"[\w./-]+\*", re.ASCII)
"""A wildcard for all names that begin alike."""


class Exceptions:
    """What a configuration leaves dense.

    Engines read these lists in different ways: vLLM takes names whole or as parts of names, transformers as beginnings
    and ends. So a module may be left dense for sure, by every reading, or perhaps, by one of them.

    Args:
        field: the name of the list, for messages.
        entries: of the list.
        language: it is in.
        around: has the function that matches regular expressions.
    """

    def __init__(self, field: str, entries: object, language: Language, around: Surroundings) -> None:
        self.field = field
        listed = entries if isinstance(entries, list | tuple) else []
        self._entries = [entry for entry in listed if isinstance(entry, str) and entry]
        self._language, self._match = language, around.match
        self._names = {entry for entry in self._entries if self._is_name(entry)}
        self._below: dict[str, bool] = {}
        self._patterns = [entry for entry in self._entries if entry not in self._names]

    def surely(self, modules: Sequence[str]) -> list[str]:
        """Return the modules that are left dense by every reading.

        Raises:
            PatternError: an entry cannot be used.
        """
        rest = [module for module in modules if not self._is_named(module)]
        hit = set(modules) - set(rest)
        hit |= set(self._matching([self._expression(entry) for entry in self._patterns], rest))
        return [module for module in modules if module in hit]

    def perhaps(self, modules: Sequence[str]) -> set[str]:
        """Return the modules that are left dense by some reading.

        Raises:
            PatternError: an entry cannot be used.
        """
        hit = {module for module in modules if self._is_named(module)}
        rest = [module for module in modules if module not in hit]
        hit |= {module for module in rest if any(name in module or module in name for name in self._names)}
        rest = [module for module in rest if module not in hit]
        return hit | set(self._matching([f".*(?:{self._loose(entry)})" for entry in self._patterns], rest))

    def _is_name(self, entry: str) -> bool:
        if self._language == "targets":
            return not entry.startswith("re:")
        return bool(_PLAIN.fullmatch(entry))

    def _is_named(self, module: str) -> bool:
        if module in self._names:
            return True
        # Full names alone count in compressed-tensors and ModelOpt.
        if self._language != "names" or not self._names:
            return False
        return self._is_below(module.rpartition(".")[0]) or self._ends_in_name(module)

    def _ends_in_name(self, module: str) -> bool:
        """Return True where the last components of a path are named: transformers takes a name as an end too."""
        return any(module[at + 1 :] in self._names for at, char in enumerate(module) if char == ".")

    def _is_below(self, path: str) -> bool:
        """Return True for the path of a module that is named, or is below one."""
        known = self._below.get(path)
        if known is None:
            parent = path.rpartition(".")[0]
            known = self._below[path] = path in self._names or (parent != "" and self._is_below(parent))
        return known

    def _expression(self, entry: str) -> str:
        if self._language == "wildcards" and _BEGINNING.fullmatch(entry):
            return entry.removesuffix("*")  # looked up, however many there are
        if self._language == "targets":
            return entry.removeprefix("re:")
        # A name as transformers 5.23 matches it: from the start, up to the border of a module (`should_convert_module`).
        return (
            fnmatch.translate(entry) if self._language == "wildcards" else rf"(?:{entry})(?:(?<=\.)|(?=\.|$))"
        )

    def _loose(self, entry: str) -> str:
        if self._language == "wildcards":
            return ".*".join(map(re.escape, entry.split("*")))
        return entry.removeprefix("re:").removeprefix("^")

    def _matching(self, expressions: Sequence[str], modules: Sequence[str]) -> Iterable[str]:
        if not expressions or not modules:
            return ()
        try:
            found = matching(expressions, modules, self._match)
        except PatternError as exc:
            sentence = f"{self.field} has {quoted(self._patterns[exc.at])}, which {exc}"
            raise PatternError(exc.at, sentence) from exc
        return (module for module, hits in zip(modules, found, strict=True) if hits)

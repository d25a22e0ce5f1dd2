"""Regular expressions that someone else wrote, as the fields of a configuration have them, within one limit of time.

Nearly all of them are names: letters, digits and dots, where a dot may be any character. Those are looked up in
tables, however many there are. All others are matched in a separate process (`lora_merge.peft_rules.matcher`).
"""

from __future__ import annotations

import re
import threading
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from lora_merge.core.report import error
from lora_merge.errors import PlanError
from lora_merge.peft_rules.matcher import Matcher, MatcherError
from lora_merge.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LIMIT_SECONDS = 3.0
"""Of the processor's time for one field of an adapter: all its patterns, all names. People's take milliseconds."""

_MOST_CHARACTERS = 200_000
"""Of a pattern; those that list every module of a large model have some ten thousand."""

_SHOWN_CHARACTERS = 200

Form = Literal["whole", "end", "layer"]
_EXPRESSIONS: dict[Form, str] = {
    "whole": "{}",
    "end": r"(.*\.)?({})$",
    "layer": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
}
"""What PEFT makes of a pattern: of ``target_modules``, of ``rank_pattern`` and ``alpha_pattern``, of ``layers_pattern``
(``check_target_module_exists`` and ``get_pattern_key``, PEFT 0.21.2)."""

_NAME = re.compile(r"(?:[\w/-]|\\?\.)*+", re.ASCII)
"""A pattern that matches names of one length, letter by letter. It is possessive (``*+``), so a miss costs no second try."""

_ANCHORED_NAME = re.compile(rf"\^?{_NAME.pattern}\$?", re.ASCII)
"""The same, where nothing of a name may come before or after it."""

_ANY = "."
"""Among the letters of a name: any character."""

_DOT = "\0"
"""Among the letters of a name: a dot and nothing else."""


class TargetError(PlanError, ValueError):
    """A field of the adapter's configuration has a value that PEFT could not use either.

    Planning collects these with its other issues; where one is found later, it is the only issue.
    """

    def __init__(self, field: str, sentence: str, hint: str = "") -> None:
        self.field, self.sentence = field, sentence
        self.issue = error("bad-field", field, sentence, hint)
        super().__init__([self.issue])


class Patterns:
    """The patterns of one field. Threads may share them.

    Args:
        field: that they are from.
        entries: the patterns, in their order.
        form: what PEFT makes of one.

    Raises:
        TargetError: one is longer than any that someone means.
    """

    def __init__(self, field: str, entries: Sequence[str], form: Form) -> None:
        self._field, self._entries = field, entries
        for entry in entries:
            if len(entry) > _MOST_CHARACTERS:
                sentence = f"has {len(entry)} characters, expected at most {_MOST_CHARACTERS}"
                raise TargetError(field, sentence)
        is_name = _NAME if form == "layer" else _ANCHORED_NAME
        simple = [at for at, entry in enumerate(entries) if is_name.fullmatch(entry)]
        self._names = _Names({at: entries[at] for at in simple}, form, field)
        known = set(simple)
        self._others = [at for at in range(len(entries)) if at not in known]
        how: Literal["match", "fullmatch"] = "fullmatch" if form == "whole" else "match"
        self._matcher = Matcher(
            [_EXPRESSIONS[form].format(entries[at]) for at in self._others], how, LIMIT_SECONDS
        )
        self._found: dict[str, list[tuple[int, str | None]]] = {}
        self._lock = threading.Lock()

    def check(self) -> None:
        """Check that each pattern compiles.

        Raises:
            TargetError: one does not, or takes longer than the limit.
        """
        # Compiling is part of matching, and the empty name does as well as any.
        self.matching("")

    def matching(self, name: str) -> list[int]:
        """Return the places of the patterns that match a name, in their order.

        Raises:
            TargetError: one does not compile, or all of them take longer than the limit.
        """
        return [at for at, _ in self._hits(name)]

    def layer(self, name: str) -> str | None:
        """Return the number of the layer that a module is in, by the first pattern that matches; as text.

        Raises:
            TargetError: as `matching`.
        """
        return next((index for _, index in self._hits(name)), None)

    def learn(self, names: Sequence[str]) -> None:
        """Match many names at once, which takes less time than one after the other.

        Raises:
            TargetError: as `matching`.
        """
        if self._others:
            with self._lock:
                self._ask([name for name in dict.fromkeys(names) if name not in self._found])

    def _hits(self, name: str) -> list[tuple[int, str | None]]:
        hits = self._names.hits(name)
        if not self._others:
            return hits
        with self._lock:
            if name not in self._found:
                self._ask([name])
            return sorted([*hits, *self._found[name]])

    def _ask(self, names: Sequence[str]) -> None:
        """Have the other process match names, and keep what it finds.

        Raises:
            TargetError: as `matching`.
        """
        try:
            found = self._matcher.find(names)
        except MatcherError as exc:
            raise TargetError(self._field, self._sentence(exc)) from exc
        for name, hits in zip(names, found, strict=True):
            self._found[name] = [(self._others[at], index) for at, index in hits]

    def _sentence(self, exc: MatcherError) -> str:
        pattern = self._entries[self._others[exc.at]]
        n_more = len(self._others) - 1
        many = f", with {counted(n_more, 'other')}" if n_more else ""
        among = many if "takes more than" in str(exc) else ""
        return f"{_shown(pattern)}{among} {exc}; use plain module names instead"


class _Names:
    """Patterns that are plain names, in tables by length, so that many cost no more than one.

    Args:
        entries: place → pattern.
        form: what PEFT makes of one.
        field: that they are from.
    """

    def __init__(self, entries: dict[int, str], form: Form, field: str) -> None:
        self._entries, self._form, self._field = entries, form, field
        self._tables: dict[int, dict[tuple[int, ...], dict[str, list[int]]]] = {}
        """Length → which letters may be any → the others → places."""

        self._anchored: set[int] = set()
        """Places of those that match a whole name only."""

        self._left = LIMIT_SECONDS
        for at, entry in entries.items():
            # An escaped dot is a dot; a bare one is any character, as in every regular expression.
            letters = entry.replace("\\.", _DOT)
            if letters.startswith("^"):
                self._anchored.add(at)
            letters = letters.removeprefix("^").removesuffix("$")
            # Names with their free places in common are one table, so one look-up settles all of them.
            free = tuple(place for place, letter in enumerate(letters) if letter == _ANY)
            same = self._tables.setdefault(len(letters), {}).setdefault(free, {})
            same.setdefault(letters.replace(_DOT, "."), []).append(at)

    def hits(self, name: str) -> list[tuple[int, str | None]]:
        """Return the places of those that match a name, in their order, with the layer's number.

        Raises:
            TargetError: they are so many, and so different, that they take longer than the limit.
        """
        if not self._entries:
            return []
        # Time of this thread alone: others may be waiting for the interpreter meanwhile.
        began = time.thread_time()
        if self._form == "layer":
            hits = self._layers(name)
        else:
            hits = [(at, None) for at in sorted(set(self._ends(name)))]
        self._left -= time.thread_time() - began
        if self._left < 0:
            sentence = f"its {len(self._entries)} patterns take more than {LIMIT_SECONDS:g} s to match"
            raise TargetError(self._field, f"{sentence}; use fewer of them")
        return hits

    def _ends(self, name: str) -> Iterator[int]:
        """Yield the places of the patterns that are the whole name or, for form ``"end"``, what follows one of its
        dots.
        """
        starts = [0]
        if self._form == "end":
            starts += [at + 1 for at, letter in enumerate(name) if letter == "."]
        for start in starts:
            if "\n" in name[:start]:
                return  # a dot is any character but this
            end = name[start:]
            yield from self._same(end, start)
            if self._form == "end" and end.endswith("\n"):  # which $ takes for the end
                yield from self._same(end[:-1], start)

    def _same(self, text: str, start: int) -> Iterator[int]:
        for free, same in self._tables.get(len(text), {}).items():
            masked = list(text)
            for place in free:
                masked[place] = _ANY
            if any(text[place] == "\n" for place in free):
                continue
            for at in same.get("".join(masked), ()):
                if start == 0 or at not in self._anchored:
                    yield at

    def _layers(self, name: str) -> list[tuple[int, str | None]]:
        hits: list[tuple[int, str | None]] = []
        for at, entry in self._entries.items():
            hit = _layer_of(entry).match(name)
            if hit:
                hits.append((at, hit["idx"]))
        return hits


@lru_cache(maxsize=1024)
def _layer_of(entry: str) -> re.Pattern[str]:
    return re.compile(_EXPRESSIONS["layer"].format(entry))


@lru_cache(maxsize=16)
def patterns_of(field: str, entries: tuple[str, ...], form: Form) -> Patterns:
    """Return the patterns of a field. They are kept, with the names that were matched against them.

    Raises:
        TargetError: one is longer than any that someone means.
    """
    return Patterns(field, entries, form)


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= _SHOWN_CHARACTERS else f"{pattern[:_SHOWN_CHARACTERS]}…")

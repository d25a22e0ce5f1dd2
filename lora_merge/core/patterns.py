"""Regular expressions that someone else wrote: compiled with a sentence, matched within a time limit.

A few characters can keep Python's matcher busy for longer than the universe has been there: ``(a+)+$``. It looks for
signals meanwhile, so an alarm ends it; only the main thread of a process can set one.
"""

from __future__ import annotations

import re
import signal
import threading
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT_SECONDS = 5.0
"""For one name; those that people write take microseconds."""

_MOST_CHARACTERS = 200_000
"""Of a pattern; those that list every module of a large model have some ten thousand."""

_BRANCHING = frozenset("*+?{|")
"""A pattern without any of these is matched in one pass."""


class TargetError(ValueError):
    """A field of the adapter's configuration has a value that PEFT could not use either."""

    def __init__(self, field: str, sentence: str) -> None:
        self.field, self.sentence = field, sentence
        super().__init__(f"{field}: {sentence}")


class _TimeUpError(Exception):
    pass


def compile_pattern(field: str, pattern: str) -> re.Pattern[str]:
    """Return the compiled regex of a configuration field.

    Raises:
        TargetError: it does not compile, or is longer than any that someone means.
    """
    if len(pattern) > _MOST_CHARACTERS:
        raise TargetError(field, f"has {len(pattern)} characters, expected {_MOST_CHARACTERS} at most")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as exc:
        raise TargetError(field, f"{_shown(pattern)} is not a regular expression: {exc}") from exc


def match(field: str, pattern: str, name: str, meant: str | None = None) -> re.Match[str] | None:
    """Return how a pattern matches the beginning of a name.

    Args:
        field: that the pattern is from.
        pattern: what is matched.
        name: of a module.
        meant: the part of the pattern that the field holds; default: all of it.

    Raises:
        TargetError: it takes longer than `LIMIT_SECONDS`, or does not compile.
    """
    is_simple = _BRANCHING.isdisjoint(pattern if meant is None else meant)
    return _within_limit(field, name, compile_pattern(field, pattern), re.Pattern.match, is_simple=is_simple)


def full_match(field: str, pattern: str, name: str) -> re.Match[str] | None:
    """Return how a pattern matches all of a name.

    Raises:
        TargetError: it takes longer than `LIMIT_SECONDS`, or does not compile.
    """
    is_simple = _BRANCHING.isdisjoint(pattern)
    return _within_limit(
        field, name, compile_pattern(field, pattern), re.Pattern.fullmatch, is_simple=is_simple
    )


def _within_limit(
    field: str,
    name: str,
    pattern: re.Pattern[str],
    how: Callable[[re.Pattern[str], str], re.Match[str] | None],
    *,
    is_simple: bool,
) -> re.Match[str] | None:
    """Return how a pattern matches a name, stopped when its time is up.

    Nothing is stopped outside the main thread, or where the program has an alarm of its own; a simple pattern need not be.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if is_simple or not in_main or signal.getitimer(signal.ITIMER_REAL)[0]:
        return how(pattern, name)

    def time_up(*_: object) -> NoReturn:
        raise _TimeUpError

    before = signal.signal(signal.SIGALRM, time_up)
    try:
        signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
        try:
            return how(pattern, name)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _TimeUpError:
        sentence = f"{_shown(pattern.pattern)} takes more than {LIMIT_SECONDS:g} s to match against {name!r}"
        raise TargetError(field, sentence) from None
    finally:
        signal.signal(signal.SIGALRM, before)


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 200 else f"{pattern[:200]}…")

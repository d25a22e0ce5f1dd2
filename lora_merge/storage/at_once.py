"""The same question to many files of a slow storage, asked at once: every answer takes as long as the way there and back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

AT_ONCE = 16
"""Files that are asked at the same time."""


def of_each(ask: Callable[[str], T], names: Sequence[str]) -> list[T]:
    """Return what a function answers for each name, in their order. Threads of the caller's context ask.

    Raises:
        Exception: what the function raised first, in the order of the names.
    """
    # A context each: one cannot be entered twice, and a reader reports to the watch in it.
    with ThreadPoolExecutor(AT_ONCE) as pool:
        asked = [pool.submit(copy_context().run, ask, name) for name in names]
        return [one.result() for one in asked]


def in_turn(ask: Callable[[str], T], names: Sequence[str]) -> list[T]:
    """Return the same, asked one after the other: quicker for files of this machine."""
    return [ask(name) for name in names]

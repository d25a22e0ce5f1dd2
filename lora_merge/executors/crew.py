"""Threads that several callers share. Each caller gets what was found in the order of its items, as if it had looked itself."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

Item = TypeVar("Item")
Found = TypeVar("Found")

_AHEAD = 8
"""Items for each thread that are taken in advance: while one takes long, the others go on."""


class Crew:
    """Some threads, for everyone who has many items to look at. A context: afterwards it does nothing more.

    A look is a generator: what it yields is what it found, and between two of them it can be stopped.

    Args:
        n_threads: how many look at a time. With one, callers look for themselves, in their own threads.
        begin: called once in every thread, before its first item.
    """

    def __init__(self, n_threads: int, begin: Callable[[], object] | None = None) -> None:
        self.n_threads = n_threads
        """How many look at a time."""

        self._ended = threading.Event()
        self._pool = ThreadPoolExecutor(n_threads, "crew", initializer=begin) if n_threads > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._pool is not None:
            # Looks under way use files that the caller closes next.
            self._pool.shutdown(wait=True, cancel_futures=True)

    def each(
        self, look: Callable[[Item], Iterator[Found]], items: Iterable[Item]
    ) -> Generator[Found, None, None]:
        """Yield what was found in each item, in the order of the items. A look must not call this.

        When the caller stops listening, looks that have not begun are dropped, and those under way are stopped.

        Args:
            look: yields what it finds in an item. It is called in a copy of the caller's context.
            items: they are taken in this order, some in advance.

        Raises:
            Exception: what a look raised: the first, in the order of the items.
            CancelledError: the crew has ended meanwhile.
        """
        if self._pool is None:
            for item in items:
                for found in look(item):
                    yield found
                    self._go_on(self._ended)
            return
        left = threading.Event()
        asked: deque[Future[list[Found]]] = deque()
        try:
            for item in items:
                # A context each: one cannot be entered twice.
                asked.append(self._pool.submit(copy_context().run, self._all, look, item, left))
                if len(asked) > _AHEAD * self.n_threads:
                    yield from asked.popleft().result()
            while asked:
                yield from asked.popleft().result()
        finally:
            left.set()
            # One that was cancelled is never done where the crew has ended.
            wait([one for one in asked if not one.cancel()])

    def _all(self, look: Callable[[Item], Iterator[Found]], item: Item, left: threading.Event) -> list[Found]:
        """Return all that is found in an item. To be called in a thread of the crew."""
        everything = []
        for found in look(item):
            everything.append(found)
            self._go_on(self._ended, left)
        return everything

    def _go_on(self, *stops: threading.Event) -> None:
        """Raise CancelledError if one of some events has happened."""
        if any(stop.is_set() for stop in stops):
            raise CancelledError


ALONE = Crew(1)
"""Callers look for themselves."""

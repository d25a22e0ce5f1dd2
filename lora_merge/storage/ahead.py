"""Has the disk read what the next pieces of work need, while the current one is worked on."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, Self, TypeVar

from lora_merge.storage.sources import is_local, open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from lora_merge.storage.sources import Source

_AHEAD_BYTES = 32 << 20
"""Bytes that are asked for in advance: enough that the disk always has several reads under way."""

_AHEAD_ITEMS = 256
"""Pieces of work that are looked at in advance."""

Item = TypeVar("Item")


class _LastOpened:
    """Keeps a file open until another one is asked for: pieces of work come file by file, and there may be hundreds of
    files. A context.
    """

    def __init__(self) -> None:
        self._file = ""
        self._stack = contextlib.ExitStack()
        self._source: Source | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def source(self, file: str) -> Source:
        """Return a file, open until the next call with another one.

        Raises:
            CheckpointError: it cannot be opened.
        """
        if self._source is None or file != self._file:
            self._stack.close()
            self._source = None
            self._source, self._file = self._stack.enter_context(open_source(file)), file
        return self._source


def read_ahead(
    items: Iterable[Item], ranges: Callable[[Item], Iterable[tuple[str, int, int]]]
) -> Iterator[Item]:
    """Yield pieces of work in order. The disk is asked for the ranges of later ones before an earlier one is yielded.

    Ranges of other storages are left out: what one reader asks for there, another does not get.

    Args:
        items: the pieces of work.
        ranges: returns the file, the first byte and the number of bytes of each range that a piece will read.

    Raises:
        CheckpointError: a file cannot be opened.
    """
    asked: deque[tuple[Item, int]] = deque()
    total = 0
    with _LastOpened() as opened:
        for item in items:
            nbytes = 0
            for file, start, size in ranges(item):
                if is_local(file):
                    opened.source(file).ahead(start, size)
                    nbytes += size
            asked.append((item, nbytes))
            total += nbytes
            while total > _AHEAD_BYTES or len(asked) > _AHEAD_ITEMS:
                first, nbytes = asked.popleft()
                total -= nbytes
                yield first
        yield from (item for item, _ in asked)

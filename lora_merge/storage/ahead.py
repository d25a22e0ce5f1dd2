"""Has the disk read what the next pieces of work need, while the current one is worked on."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, TypeVar

from lora_merge.storage.sources import is_local, open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from lora_merge.storage.sources import Source

_AHEAD_BYTES = 32 << 20
"""Bytes that are asked for in advance: enough that the disk always has several reads under way."""

_AHEAD_ITEMS = 256
"""Pieces of work that are looked at in advance."""

Item = TypeVar("Item")


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
    with contextlib.ExitStack() as stack:
        sources: dict[str, Source] = {}
        for item in items:
            nbytes = 0
            for file, start, size in ranges(item):
                if is_local(file):
                    if file not in sources:
                        sources[file] = stack.enter_context(open_source(file))
                    sources[file].ahead(start, size)
                    nbytes += size
            asked.append((item, nbytes))
            total += nbytes
            while total > _AHEAD_BYTES or len(asked) > _AHEAD_ITEMS:
                first, nbytes = asked.popleft()
                total -= nbytes
                yield first
        yield from (item for item, _ in asked)

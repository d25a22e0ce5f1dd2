"""Bytes of rows, read at their places in a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.storage.reading import read_unwatched

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.storage.sources import Source


def content_of(source: Source, start: int, n_bytes: int, rows: Sequence[int]) -> bytearray:
    """Return the bytes of some rows, one after the other."""
    runs = _runs(rows)
    found = [content_at(source, start + first * n_bytes, (last - first) * n_bytes) for first, last in runs]
    return found[0] if len(found) == 1 else bytearray().join(found)


def content_at(source: Source, start: int, n_bytes: int) -> bytearray:
    """Return some bytes at a place. They are read by their place, so that threads do not move each other's."""
    content = bytearray(n_bytes)
    read_unwatched(source, memoryview(content), start)
    return content


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Group row numbers into ranges of adjacent rows: one read each."""
    if isinstance(rows, range) and rows.step == 1:
        return [(rows.start, rows.stop)] if rows else []
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs

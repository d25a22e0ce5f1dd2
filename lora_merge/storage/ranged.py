"""Files of slow storages as sources: ranged reads of one version, with blocks that are fetched ahead."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

from lora_merge.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_merge.core.identity import FileIdentity

BLOCK_BYTES = 8 << 20
"""Of one request that is made ahead."""

BLOCKS_AHEAD = 4
"""Most blocks of one source that are under way, or fetched and not read yet."""

SMALL_BYTES = 256 << 10
"""Least bytes of a request that was not announced: a header needs one request then, not two."""

FETCHERS = 32
"""Most requests of one process at a time that are made ahead."""


@cache
def _fetchers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(FETCHERS, "fetch")


class _Block:
    """A range that is being fetched, or is there."""

    def __init__(self, start: int, end: int, content: Future[memoryview]) -> None:
        self.start, self.end, self.content = start, end, content

    def has(self, offset: int) -> bool:
        return self.start <= offset < self.end


class RangedSource:
    """One version of a file (a `storage.sources.Source`).

    Args:
        text: its name, as messages have it.
        version: which version; its size is in it.
        fetch: returns the bytes from a first one up to another, in one request that demands this version. Several
            threads may call it at once.
    """

    fd = None

    def __init__(self, text: str, version: FileIdentity, fetch: Callable[[int, int], memoryview]) -> None:
        self.text, self.nbytes, self.version = text, version.size, version
        self._get = fetch
        self._lock = threading.Lock()
        self._wanted: deque[tuple[int, int]] = deque()
        self._blocks: list[_Block] = []
        self._small: _Block | None = None

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Read into a buffer from an offset; return the number of bytes, 0 at the end.

        Raises:
            ChangedError: the file has changed since it was opened.
            CheckpointError: it cannot be read.
        """
        count = min(len(buffer), self.nbytes - offset)
        if count <= 0:
            return 0
        block = self._block_at(offset)
        if block is None:
            return self._read_directly(buffer[:count], offset)
        count = min(count, block.end - offset)
        # Waited for without the lock, so that other threads can read other blocks.
        buffer[:count] = block.content.result()[offset - block.start : offset - block.start + count]
        # Readers go forward, so a block that was read to its end makes room for the next.
        if offset + count == block.end:
            self._drop(block)
        return count

    def ahead(self, start: int, nbytes: int) -> None:
        """Fetch a range in blocks, a few of them at a time. What is announced is taken to be read in that order."""
        end = min(start + nbytes, self.nbytes)
        with self._lock:
            while start < end:
                stop = min(start + BLOCK_BYTES, end)
                self._wanted.append((start, stop))
                start = stop
            self._ask()

    def close(self) -> None:
        """Forget what was fetched and not read."""
        with self._lock:
            self._wanted.clear()
            for block in self._blocks:
                block.content.cancel()
            self._blocks.clear()
            self._small = None

    def _ask(self) -> None:
        """Request the next blocks, as many as may be under way. The lock is held."""
        while self._wanted and len(self._blocks) < BLOCKS_AHEAD:
            start, end = self._wanted.popleft()
            self._blocks.append(_Block(start, end, _fetchers().submit(self._fetch, start, end)))

    def _block_at(self, offset: int) -> _Block | None:
        """Return the block that has a byte; None where none was announced."""
        with self._lock:
            if self._small is not None and self._small.has(offset):
                return self._small
            for block in self._blocks:
                if block.has(offset):
                    return block
            skipped = next((n for n, (start, end) in enumerate(self._wanted) if start <= offset < end), None)
            if skipped is None:
                return None
            # The reader has skipped what was announced before: it would be in the way for ever.
            for _ in range(skipped):
                self._wanted.popleft()
            self._blocks.clear()
            self._ask()
            return self._blocks[0]

    def _drop(self, block: _Block) -> None:
        """Let go of a block that was read, and request the next one."""
        with self._lock:
            if block in self._blocks:
                self._blocks.remove(block)
            elif block is self._small:
                self._small = None
            self._ask()

    def _read_directly(self, buffer: memoryview, offset: int) -> int:
        """Read what was not announced."""
        count = len(buffer)
        content = self._fetch(offset, min(offset + max(count, SMALL_BYTES), self.nbytes))
        buffer[:] = content[:count]
        if count < len(content):
            kept: Future[memoryview] = Future()
            kept.set_result(content)
            with self._lock:
                self._small = _Block(offset, offset + len(content), kept)
        return count

    def _fetch(self, start: int, end: int) -> memoryview:
        """Return a range, in one request.

        Raises:
            ChangedError: the file has changed since it was opened.
            CheckpointError: it cannot be read, or another number of bytes came.
        """
        content = self._get(start, end)
        if len(content) != end - start:
            what = f"the store gave {len(content)} bytes for a range of {end - start}"
            raise CheckpointError(self.text, "", what, hint="run again while no other program writes to it")
        return content

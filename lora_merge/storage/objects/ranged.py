"""Objects as sources: ranged reads of one version, with blocks that are fetched ahead."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

from lora_merge.core.identity import FileIdentity
from lora_merge.errors import CheckpointError
from lora_merge.storage.objects.failures import reading
from lora_merge.storage.objects.store import match_of

if TYPE_CHECKING:
    from obstore.store import ObjectStore

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
    """One version of an object (a `storage.sources.Source`). Each request demands that version.

    Args:
        store: the bucket.
        key: of the object in it.
        text: its URL, as messages have it.
        nbytes: its size.
        tag: its ETag; empty where the store has none.
    """

    fd = None

    def __init__(self, store: ObjectStore, key: str, text: str, nbytes: int, tag: str) -> None:
        self.text, self.nbytes = text, nbytes
        self.version = FileIdentity(0, 0, nbytes, 0, 0, tag)
        self._store, self._key, self._tag = store, key, tag
        self._lock = threading.Lock()
        self._wanted: deque[tuple[int, int]] = deque()
        self._blocks: list[_Block] = []
        self._small: _Block | None = None

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Read into a buffer from an offset; return the number of bytes, 0 at the end.

        Raises:
            ChangedError: the object has changed since it was opened.
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
            ChangedError: the object has changed since it was opened.
            CheckpointError: it cannot be read, or the store gave another number of bytes.
        """
        import obstore

        with reading(self.text):
            got = obstore.get(
                self._store, self._key, options={"range": (start, end), "if_match": match_of(self._tag)}
            )
            content = memoryview(got.bytes())
        if len(content) != end - start:
            what = f"the store gave {len(content)} bytes for a range of {end - start}"
            raise CheckpointError(self.text, "", what, hint="run again while no other program writes to it")
        return content

"""Positioned reads from sources into reused buffers, with read-ahead."""

from __future__ import annotations

import contextlib
import errno
import io
from typing import TYPE_CHECKING

from lora_merge.errors import CheckpointError
from lora_merge.storage import input_files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed import WriteableBuffer

    from lora_merge.storage.sources import Source

BLOCK_BYTES = 1 << 22
"""Bytes of one read, where a whole file or tensor passes through."""

_AHEAD_BYTES = 32 << 20
"""Bytes that the storage is asked for in advance."""

_BLOCKS: list[memoryview] = []
"""Blocks that are free to be used. `list.pop` and `append` are safe between threads."""


@contextlib.contextmanager
def borrowed_block() -> Iterator[memoryview]:
    """Yield a block of `BLOCK_BYTES` that is used again later: the kernel need not find and clear new pages each
    time.
    """
    # Not asked first whether there is one: another thread may take the last in between.
    try:
        block = _BLOCKS.pop()
    except IndexError:
        block = memoryview(bytearray(BLOCK_BYTES))
    try:
        yield block
    finally:
        _BLOCKS.append(block)


def read_into(source: Source, buffer: memoryview, offset: int) -> None:
    """Fill a buffer from an offset of a source, and report what was read to `input_files`.

    Raises:
        CheckpointError: the file ends too soon, or cannot be read.
        ChangedError: the run has read other bytes there (`input_files.watching`).
    """
    read_unwatched(source, buffer, offset)
    input_files.tell_read(source.text, offset, buffer)


def read_unwatched(source: Source, buffer: memoryview, offset: int) -> None:
    """Fill a buffer from an offset of a source, without a report: for readers that take a digest themselves.

    Raises:
        CheckpointError: the file ends too soon, or cannot be read.
    """
    done = 0
    while done < len(buffer):
        n_read = read_some(source, buffer[done:], offset + done)
        if n_read == 0:
            raise CheckpointError(
                source.text,
                "",
                f"ends at byte {offset + done}",
                f"{offset + len(buffer)} or more",
                hint="run again while no other program writes to it: it changed while it was read",
            )
        done += n_read


def read_some(source: Source, buffer: memoryview, offset: int) -> int:
    """Read into a buffer with one call; return the number of bytes, 0 at the end.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return source.read_into(buffer, offset)
    except OSError as exc:
        raise CheckpointError(source.text, "", f"cannot be read ({exc.strerror})") from exc


class ReadAhead:
    """Asks the storage for the next bytes of a range while the earlier ones are worked on.

    Args:
        source: what is read.
        start: of the range, in bytes; end: the byte after it.
        is_watched: False where the caller takes a digest of what is read.
    """

    def __init__(self, source: Source, start: int, end: int, *, is_watched: bool = True) -> None:
        self._source, self._asked, self._end = source, start, end
        self._read = read_into if is_watched else read_unwatched

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from an offset of the source. Bytes before the offset are not asked for.

        Raises:
            CheckpointError: the file ends too soon, or cannot be read.
        """
        self._asked = max(self._asked, offset)
        # Asked for in large steps, each when half of the last one is used up: one call for many tiles.
        if self._asked < min(offset + len(buffer) + _AHEAD_BYTES // 2, self._end):
            count = min(_AHEAD_BYTES, self._end - self._asked)
            self._source.ahead(self._asked, count)
            self._asked += count
        self._read(self._source, buffer, offset)


def read_blocks(
    source: Source, start: int, nbytes: int, block_bytes: int = BLOCK_BYTES
) -> Iterator[memoryview]:
    """Yield the bytes of a range in order, block by block, through one reused buffer.

    Args:
        source: what is read.
        start: of the range, in bytes.
        nbytes: of the range.
        block_bytes: of each block, `BLOCK_BYTES` at most.

    Raises:
        CheckpointError: the file ends too soon, or cannot be read.
    """
    ahead = ReadAhead(source, start, start + nbytes)
    with borrowed_block() as block:
        for at in range(0, nbytes, block_bytes):
            part = block[: min(block_bytes, nbytes - at)]
            ahead.read_into(part, start + at)
            yield part


class _Stream(io.RawIOBase):
    """A source as a raw binary stream."""

    def __init__(self, source: Source) -> None:
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        n_read = self._source.read_into(memoryview(buffer).cast("B"), self._at)
        self._at += n_read
        return n_read

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begins = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.nbytes}
        at = begins[whence] + offset
        if at < 0:
            raise OSError(errno.EINVAL, "a place before the beginning")
        self._at = at
        return at


def stream_of(source: Source) -> io.BufferedReader:
    """Return a source as a buffered binary file, for libraries that want one. It is valid as long as the source is
    open.
    """
    return io.BufferedReader(_Stream(source))

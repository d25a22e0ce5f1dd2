"""Positioned reads into buffers that are used again, and the disk asked in advance.

Every transfer loops: one system call moves at most 0x7ffff000 bytes, and reads short without an error.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from lora_merge.errors import CheckpointError
from lora_merge.storage import input_files
from lora_merge.storage.writing import MAX_TRANSFER_BYTES, UNABLE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCK_BYTES = 1 << 22
"""Read at once, where a whole file or tensor passes by."""


_AHEAD_BYTES = 32 << 20
"""Asked of the disk in advance."""


_BLOCKS: list[memoryview] = []
"""Blocks that nobody has borrowed."""


@contextlib.contextmanager
def borrowed_block() -> Iterator[memoryview]:
    """Yield a block of memory, `BLOCK_BYTES` long, that comes back at the end: the kernel need not find a new one."""
    try:
        block = _BLOCKS.pop()
    except IndexError:
        block = memoryview(bytearray(BLOCK_BYTES))
    try:
        yield block
    finally:
        _BLOCKS.append(block)


def read_into(fd: int, buffer: memoryview, offset: int, label: str | Path) -> None:
    """Fill a buffer from an offset of a file.

    Raises:
        CheckpointError: the file ends too soon, or the disk cannot be read.
        ChangedError: the run has read other bytes there (`input_files.watching`).
    """
    read_unwatched(fd, buffer, offset, label)
    input_files.tell_read(label, offset, buffer)


def read_unwatched(fd: int, buffer: memoryview, offset: int, label: str | Path) -> None:
    """Fill a buffer from an offset of a file; for what has a digest of its own.

    Raises:
        CheckpointError: the file ends too soon, or the disk cannot be read.
    """
    done = 0
    while done < len(buffer):
        try:
            n_read = _read(fd, buffer[done : done + MAX_TRANSFER_BYTES], offset + done)
        except OverflowError:  # no file is as long as that
            n_read = 0
        except OSError as exc:
            raise CheckpointError(str(label), "", f"cannot be read ({exc.strerror})") from exc
        if n_read == 0:
            raise CheckpointError(
                str(label), "", f"ends at byte {offset + done}", f"{offset + len(buffer)} or more",
                hint="it changed while it was read; run again when nothing else writes to it",
            )  # fmt: skip
        done += n_read


def _read(fd: int, buffer: memoryview, offset: int) -> int:
    """Read into a buffer with one call; return how many bytes.

    Python asks for ``preadv2``, which some filesystems and sandboxes refuse; ``pread`` is the call that all know.
    """
    try:
        return os.preadv(fd, [buffer], offset)
    except OSError as exc:
        if exc.errno not in UNABLE:
            raise
    data = os.pread(fd, min(len(buffer), BLOCK_BYTES), offset)
    buffer[: len(data)] = data
    return len(data)


class ReadAhead:
    """Has the disk fetch what of a range will be read next, while what was fetched before is worked on.

    Args:
        fd: of the file.
        start: of the range, in bytes; end: the byte after it.
        is_watched: False where the caller takes a digest of what is read.
    """

    def __init__(self, fd: int, start: int, end: int, *, is_watched: bool = True) -> None:
        self._fd, self._asked, self._end = fd, start, end
        self._read = read_into if is_watched else read_unwatched

    def read_into(self, buffer: memoryview, offset: int, label: str | Path) -> None:
        """Fill a buffer from an offset of the file; what lies before it is not fetched.

        Raises:
            CheckpointError: the file ends too soon, or the disk cannot be read.
        """
        self._asked = max(self._asked, offset)
        if self._asked < min(offset + len(buffer) + _AHEAD_BYTES // 2, self._end):
            count = min(_AHEAD_BYTES, self._end - self._asked)
            if hasattr(os, "posix_fadvise"):
                with contextlib.suppress(OSError):  # it is a wish
                    os.posix_fadvise(self._fd, self._asked, count, os.POSIX_FADV_WILLNEED)
            self._asked += count
        self._read(self._fd, buffer, offset, label)


def read_blocks(fd: int, start: int, nbytes: int, label: str | Path) -> Iterator[memoryview]:
    """Yield the bytes of a range in order, block by block, through one reused buffer.

    Raises:
        CheckpointError: the file ends too soon, or the disk cannot be read.
    """
    ahead = ReadAhead(fd, start, start + nbytes)
    with borrowed_block() as block:
        for at in range(0, nbytes, BLOCK_BYTES):
            part = block[: min(BLOCK_BYTES, nbytes - at)]
            ahead.read_into(part, start + at, label)
            yield part

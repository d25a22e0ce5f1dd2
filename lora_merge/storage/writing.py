"""Positioned writes, past the page cache where the kernel can; space for files; errors of failed writes."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING

from lora_merge.errors import OutOfMemoryError, WriteError
from lora_merge.storage.local import UNABLE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

PAGE_BYTES = 4096
"""A page of the page cache; a multiple of the blocks of every filesystem that can share them."""


_RWF_DONTCACHE = 0x80
"""The flag of Linux's ``pwritev2(2)``."""


_FULL = {errno.ENOSPC, errno.EDQUOT}
"""Error codes of a full disk, and of a used-up quota."""


def write_from(fd: int, buffer: memoryview, offset: int, label: str | Path) -> None:
    """Write a whole buffer at an offset of a file.

    Raises:
        WriteError: the disk is full or cannot be written.
    """
    _write_all(fd, [buffer], offset, label)


def _write_all(
    fd: int, buffers: list[memoryview], offset: int, label: str | Path, *, uncached: bool = False
) -> None:
    """Write buffers one after the other, past the page cache if that is wanted. A call that is refused is not tried
    again.
    """
    ways: list[Callable[[int, list[memoryview], int], int]] = [os.pwritev, _pwrite]
    # Elsewhere the flag has no meaning, or another one.
    if uncached and sys.platform == "linux":
        ways.insert(0, _write_uncached)
    while buffers:
        try:
            n_written = ways[0](fd, buffers, offset)
        except OSError as exc:
            # The last way is the one that every system knows, so its error is a real one.
            if len(ways) == 1 or exc.errno not in UNABLE:
                raise write_error(label, exc) from exc
            del ways[0]
            continue
        offset += n_written
        while buffers and n_written >= len(buffers[0]):
            n_written -= len(buffers.pop(0))
        if buffers:
            buffers[0] = buffers[0][n_written:]


def _write_uncached(fd: int, buffers: list[memoryview], offset: int) -> int:
    return os.pwritev(fd, buffers, offset, _RWF_DONTCACHE)


def _pwrite(fd: int, buffers: list[memoryview], offset: int) -> int:
    """Write the first buffer with ``pwrite``: `os.pwritev` uses ``pwritev2``, which some sandboxes refuse."""
    return os.pwrite(fd, buffers[0], offset)


class Stream:
    """Writes a range of a file from its beginning to its end, past the page cache where the kernel can.

    With ``RWF_DONTCACHE`` (Linux 6.14 and later, on ext4, XFS and btrfs) data goes to the disk at once, and its few
    pages are used again for what comes next. Elsewhere it is written as usual. Only whole pages are sent, except at
    the ends: of a page in part, the rest would have to be read.

    Args:
        fd: of the file.
        start: of the range, in bytes.
        label: what to call the file in messages.
    """

    def __init__(self, fd: int, start: int, label: str | Path) -> None:
        self._fd, self._label = fd, label
        self._offset = start
        self._held = bytearray()

    def write(self, buffer: memoryview) -> None:
        """Write the next bytes, up to the last whole page. The rest is kept for the next call, so the buffer may be
        reused.

        Raises:
            WriteError: the disk is full or cannot be written.
        """
        end = self._offset + len(self._held) + len(buffer)
        # Up to the last page boundary in the file, whatever the start of the range.
        n_whole = end - end % PAGE_BYTES - self._offset - len(self._held)
        if n_whole <= 0:
            self._held += buffer
            return
        held = [memoryview(self._held)] if self._held else []
        _write_all(self._fd, [*held, buffer[:n_whole]], self._offset, self._label, uncached=True)
        self._offset += len(self._held) + n_whole
        self._held = bytearray(buffer[n_whole:])

    def finish(self) -> None:
        """Write the bytes that were kept back: the last page of the range, in part.

        Raises:
            WriteError: the disk is full or cannot be written.
        """
        if self._held:
            write_from(self._fd, memoryview(self._held), self._offset, self._label)
            self._offset, self._held = self._offset + len(self._held), bytearray()


def allocate(fd: int, nbytes: int) -> None:
    """Give a file its size, and reserve its blocks where the filesystem can.

    Raises:
        OSError: the disk is full.
    """
    # Reserved blocks mean that a full disk is found now, not in the middle of the merge.
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as exc:
            if exc.errno in _FULL:
                raise
        else:
            return
    try:
        os.ftruncate(fd, nbytes)
    except PermissionError:  # a filesystem that makes no file longer but by writing to it
        os.pwrite(fd, b"\0", nbytes - 1)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, in row-major order; copied only if it is not contiguous."""
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def write_error(label: str | Path, exc: OSError) -> WriteError:
    """Return the error for a failed write, with what to do about it."""
    if exc.errno == errno.ENOMEM:
        return OutOfMemoryError(f"writing {label}")
    if exc.errno in _FULL:
        return WriteError(
            f"{label}: no space left on the disk", hint="free disk space, or choose another --out"
        )
    hint = ""
    if exc.errno == errno.EROFS:
        hint = "choose an --out on another disk: this one is read-only"
    elif exc.errno in {errno.EACCES, errno.EPERM}:
        hint = "choose an --out where you have permission to write"
    elif exc.errno == errno.ENAMETOOLONG:
        hint = "choose a shorter --out"
    return WriteError(f"{label}: cannot be written ({exc.strerror or exc})", hint=hint)

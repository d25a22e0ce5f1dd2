"""Which bytes of a file may change without a trace in its times, by what Linux says of its page cache and the filesystem.

A write through a mapping sets the time of a file when it meets a page that is clean: the kernel is told by a fault. A page
that is dirty already is written without a fault, so its change leaves no trace until it is clean again.

References:
    ``file_update_time`` in ``filemap_page_mkwrite`` (Linux 6.18, ``mm/filemap.c``); cachestat(2), since Linux 6.5; "racily clean"
    entries in Git's ``Documentation/technical/racy-git.txt``.
"""

from __future__ import annotations

import sys
import time
from functools import cache
from typing import TYPE_CHECKING, Any

from lora_merge.core.identity import InputFile

if TYPE_CHECKING:
    from lora_merge.core.identity import FileIdentity, Range
    from lora_merge.storage.sources import Source

_TIMED = frozenset({0xEF53, 0x58465342, 0x9123683E, 0xF2F52010})
"""``f_type`` of ext4, XFS, btrfs and F2FS, which set the time of a file when a clean page of a mapping is written."""

_UNTIMED = frozenset({0x01021994, 0x858458F6})
"""``f_type`` of tmpfs and ramfs, which do not."""

_CACHESTAT = 451
"""The number of the system call, on x86 and ARM as nearly everywhere."""

_STEP_BYTES = 16 << 20
"""Granularity of the answer for a file with dirty pages."""

_TICK_NS, _COARSE_NS = 50_000_000, 2_000_000_000
"""Two changes closer than this may have one time: the kernel's clock for files ticks every 1 to 10 ms, and some
filesystems keep whole seconds."""


def look_at(source: Source) -> InputFile:
    """Return the identity of an opened file, with the byte ranges in which a later change may leave no trace in its
    times.
    """
    fd, identity = source.fd, source.version
    # Not a local file: other bytes have another tag.
    if fd is None:
        return InputFile(identity)
    everything = ((0, identity.size),)
    kind = _filesystem(fd)
    # All bytes are in doubt, so all are read again at the end.
    if kind in _UNTIMED or _is_young(identity, time.time_ns()):
        return InputFile(identity, everything)
    # A network filesystem, or one that is not known: nothing can be said.
    if kind not in _TIMED:
        return InputFile(identity, is_known=False, is_local=False)
    dirty = _dirty_ranges(fd, identity.size)
    return InputFile(identity, is_known=False) if dirty is None else InputFile(identity, dirty)


def _is_young(identity: FileIdentity, now: int) -> bool:
    """Return True when a file changed so recently that another change could get the same time ("racily clean" in
    Git).
    """
    # A time without a fraction may come from a filesystem that keeps whole seconds.
    tick = _TICK_NS if identity.changed % 1_000_000_000 else _COARSE_NS
    return now - identity.changed < tick


def _dirty_ranges(fd: int, size: int) -> tuple[Range, ...] | None:
    """Return the byte ranges of a file with pages that are not on the disk yet; None where the kernel cannot say."""
    # One call for the whole file first, since most files have no dirty page.
    whole = _is_dirty(fd, 0, size)
    if not whole:
        return None if whole is None else ()
    found: list[Range] = []
    for start in range(0, size, _STEP_BYTES):
        end = min(start + _STEP_BYTES, size)
        if not _is_dirty(fd, start, end - start):
            continue
        if found and found[-1][1] == start:
            start = found.pop()[0]  # noqa: PLW2901 - two neighbours are one range
        found.append((start, end))
    return tuple(found)


def _is_dirty(fd: int, start: int, nbytes: int) -> bool | None:
    """Return whether a range of a file has dirty pages, or pages being written; None where the kernel cannot say."""
    library = _library()
    if library is None:
        return None
    import ctypes

    wanted, found = (ctypes.c_uint64 * 2)(start, nbytes), (ctypes.c_uint64 * 5)()
    if library.syscall(_CACHESTAT, fd, wanted, found, 0) != 0:
        return None
    _, n_dirty, n_written, *_ = found
    return n_dirty + n_written > 0


def _filesystem(fd: int) -> int | None:
    """Return the ``f_type`` (statfs) of the filesystem that a file is on; None where it cannot be asked."""
    library = _library()
    if library is None:
        return None
    import ctypes

    answer = ctypes.create_string_buffer(256)  # struct statfs has 120 bytes
    if library.fstatfs(fd, answer) != 0:
        return None
    return ctypes.c_long.from_buffer(answer).value & 0xFFFFFFFF


@cache
def _library() -> Any:
    """Return the C library on Linux; None elsewhere."""
    if sys.platform != "linux":
        return None
    import ctypes

    return ctypes.CDLL(None, use_errno=True)

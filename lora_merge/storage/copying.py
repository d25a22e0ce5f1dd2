"""Bytes from one file to another: in the kernel where it can, and shared by both files where the filesystem can."""

from __future__ import annotations

import errno
import os
import struct
import sys
from typing import TYPE_CHECKING, Literal

from lora_merge.storage import input_files
from lora_merge.storage.local import CLOEXEC, open_for_reading
from lora_merge.storage.reading import read_blocks
from lora_merge.storage.writing import MAX_TRANSFER_BYTES, PAGE_BYTES, write_from

if TYPE_CHECKING:
    from pathlib import Path

_FICLONE, _FICLONERANGE = 0x40049409, 0x4020940D
"""The requests of Linux's ``ioctl_ficlone(2)`` and ``ioctl_ficlonerange(2)``."""


def copy_range(
    source_fd: int, start: int, nbytes: int, target_fd: int, target_start: int, labels: tuple[str, str]
) -> None:
    """Copy bytes from one file to another, in the kernel where the platform can.

    Where the filesystem shares blocks between files, nothing is moved.

    Args:
        labels: what to call source and target in messages.

    Raises:
        CheckpointError: the source ends too soon.
        WriteError: the disk is full or cannot be written.
    """
    first, last = _share_blocks(source_fd, start, nbytes, target_fd, target_start)
    for begin, end in ((0, first), (last, nbytes)):
        at = begin + _copy_in_kernel(source_fd, start + begin, end - begin, target_fd, target_start + begin)
        for block in read_blocks(source_fd, start + at, end - at, labels[0]):
            write_from(target_fd, block, target_start + at, labels[1])
            at += len(block)


def _share_blocks(
    source_fd: int, start: int, nbytes: int, target_fd: int, target_start: int
) -> tuple[int, int]:
    """Let two files share the whole blocks of a range; return which part of the range that is, from its start.

    It takes a filesystem that can (XFS, btrfs), and a range that lies in both files alike.
    """
    first = -start % PAGE_BYTES
    last = (start + nbytes) // PAGE_BYTES * PAGE_BYTES - start
    if (start - target_start) % PAGE_BYTES or first >= last or sys.platform != "linux":
        return 0, 0
    import fcntl

    wanted = struct.pack("=qQQQ", source_fd, start + first, last - first, target_start + first)
    try:
        fcntl.ioctl(target_fd, _FICLONERANGE, wanted)
    except OSError:
        return 0, 0
    return first, last


def _copy_in_kernel(source_fd: int, start: int, nbytes: int, target_fd: int, target_start: int) -> int:
    """Return how many bytes the kernel copied; it may refuse (two filesystems, another platform)."""
    done = 0
    while hasattr(os, "copy_file_range") and done < nbytes:
        count = min(MAX_TRANSFER_BYTES, nbytes - done)
        try:
            n_copied = os.copy_file_range(source_fd, target_fd, count, start + done, target_start + done)
        except OSError:  # not here, not permitted, or a fault: reading and writing by hand tells which
            break
        if n_copied == 0:
            break
        done += n_copied
    return done


def link(source: Path, target: str, how: Literal["reflink", "hard"], *, dir_fd: int) -> None:
    """Make a new file of an old one's bytes without moving them.

    Args:
        source: path of the old file.
        target: name of the new one.
        how: ``reflink``: the two share blocks until one changes; ``hard``: they are one file with two names.
        dir_fd: of the directory that the new one is in.

    Raises:
        OSError: the filesystem, or the pair of them, cannot; there is no target then.
        CheckpointError: the old one cannot be opened, or another has taken its name.
    """
    with open_for_reading(source) as old:
        if how == "hard":
            os.link(source.resolve(), target, dst_dir_fd=dir_fd)
            if not os.path.samestat(os.fstat(old), os.stat(target, dir_fd=dir_fd, follow_symlinks=False)):
                os.unlink(target, dir_fd=dir_fd)
                raise input_files.changed(str(source))
            return
        if sys.platform != "linux":
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        import fcntl

        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | CLOEXEC
        new = os.open(target, flags, 0o666, dir_fd=dir_fd)
        try:
            fcntl.ioctl(new, _FICLONE, old)
        except OSError:
            os.unlink(target, dir_fd=dir_fd)
            raise
        finally:
            os.close(new)

"""Copies bytes from a source into a file in one reading: the digest is taken, and the file filled, block by block.

What a filesystem lets two files share (XFS, btrfs) is read for its digest, and not written.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from typing import TYPE_CHECKING, Literal

from lora_merge.storage import input_files
from lora_merge.storage.digests import digest_text, new_digest
from lora_merge.storage.local import CLOEXEC
from lora_merge.storage.reading import read_blocks
from lora_merge.storage.sources import open_source
from lora_merge.storage.writing import PAGE_BYTES, write_from

if TYPE_CHECKING:
    from pathlib import Path

    from lora_merge.storage.sources import Source

_FICLONE, _FICLONERANGE = 0x40049409, 0x4020940D
"""The requests of Linux's ``ioctl_ficlone(2)`` and ``ioctl_ficlonerange(2)``."""


class CopyTarget:
    """Fills a range of a file with a range of a source, as the caller reads it.

    Args:
        source: what is copied.
        start: of its range, in bytes.
        nbytes: of either range.
        fd: of the file that is filled.
        target_start: of its range, in bytes.
        label: what to call that file in messages.
    """

    def __init__(
        self, source: Source, start: int, nbytes: int, fd: int, target_start: int, label: str
    ) -> None:
        self._fd, self._label, self._at = fd, label, target_start
        first, last = _share_blocks(source.fd, start, nbytes, fd, target_start)
        self._shared = target_start + first, target_start + last

    def write(self, block: memoryview) -> None:
        """Write the next bytes of the range. Blocks that the two files share are skipped.

        Raises:
            WriteError: the disk is full or cannot be written.
        """
        at, end = self._at, self._at + len(block)
        first, last = (min(max(place, at), end) for place in self._shared)
        # The bytes of this block before and after the shared range.
        for begin, stop in ((at, first), (last, end)) if first < last else ((at, end),):
            if begin < stop:
                write_from(self._fd, block[begin - at : stop - at], begin, self._label)
        self._at = end


def copy_range(source: Source, start: int, nbytes: int, fd: int, target_start: int, label: str) -> str:
    """Copy bytes of a source into a file.

    Args:
        source: what is copied.
        start: of its range, in bytes.
        nbytes: of the range.
        fd: of the file that is written.
        target_start: where the range begins there.
        label: what to call that file in messages.

    Returns:
        The digest of the bytes that were read.

    Raises:
        CheckpointError: the source ends too soon.
        WriteError: the disk is full or cannot be written.
    """
    target, digest = CopyTarget(source, start, nbytes, fd, target_start, label), new_digest()
    for block in read_blocks(source, start, nbytes):
        digest.update(block)
        target.write(block)
    return digest_text(digest)


def _share_blocks(
    source_fd: int | None, start: int, nbytes: int, target_fd: int, target_start: int
) -> tuple[int, int]:
    """Share the whole blocks of a range between two files, where the filesystem can (XFS, btrfs) and the range has
    the same offset within a block in both. Return which bytes of the range are shared, counted from its start.
    """
    # Only whole blocks can be shared; the bytes before and after them are copied.
    first = -start % PAGE_BYTES
    last = (start + nbytes) // PAGE_BYTES * PAGE_BYTES - start
    is_able = source_fd is not None and sys.platform == "linux"
    if not is_able or (start - target_start) % PAGE_BYTES or first >= last:
        return 0, 0
    import fcntl

    wanted = struct.pack("=qQQQ", source_fd, start + first, last - first, target_start + first)
    try:
        # Any refusal (another filesystem, a sandbox) means copying. If the disk is at fault, the copy will
        # say so.
        fcntl.ioctl(target_fd, _FICLONERANGE, wanted)
    except OSError:
        return 0, 0
    return first, last


def link(source: Path, target: str, how: Literal["reflink", "hard"], *, dir_fd: int) -> None:
    """Make a new file with an old file's bytes, without copying them.

    Args:
        source: path of the old file.
        target: name of the new one.
        how: ``reflink``: the two share blocks until one changes; ``hard``: they are one file with two names.
        dir_fd: of the directory that the new one is in.

    Raises:
        OSError: the filesystem, or the pair of them, cannot; the target does not exist then.
        CheckpointError: the old one cannot be opened, or another has taken its name.
    """
    with open_source(source) as old:
        # Another storage: EXDEV is what a link across filesystems answers.
        if old.fd is None:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        if how == "hard":
            # In the Hub's cache names are links, and the new name has to be one of the file itself.
            os.link(source.resolve(), target, dst_dir_fd=dir_fd)
            # `os.link` goes by name, and another file may have taken it since it was opened.
            if not os.path.samestat(os.fstat(old.fd), os.stat(target, dir_fd=dir_fd, follow_symlinks=False)):
                os.unlink(target, dir_fd=dir_fd)
                raise input_files.changed(str(source))
            return
        if sys.platform != "linux":
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        import fcntl

        # O_EXCL and O_NOFOLLOW: never through a link that another user has put there.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | CLOEXEC
        new = os.open(target, flags, 0o666, dir_fd=dir_fd)
        try:
            fcntl.ioctl(new, _FICLONE, old.fd)
        # Nothing is left behind: the caller then makes an ordinary file of this name.
        except OSError:
            os.unlink(target, dir_fd=dir_fd)
            raise
        finally:
            os.close(new)

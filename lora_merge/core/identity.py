"""Which file it is: what the kernel says of an open file, which changes when the file does or another takes its name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """A file as it was when it was read, taken from the descriptor that it was read through.

    The time of change (ctime) belongs to the kernel: no program sets it back, as ``cp -p``, ``rsync -t`` and archives do
    with the time of modification. Another file under the same name has another inode.
    """

    device: int
    """``st_dev``. Some filesystems choose it anew at every mount: compare it within one run only."""

    inode: int
    """``st_ino``."""

    size: int
    """In bytes."""

    modified: int
    """``st_mtime_ns``: when its bytes were written last, in nanoseconds, or whatever a program has put there."""

    changed: int
    """``st_ctime_ns``: when its bytes, name or mode changed last, in nanoseconds."""

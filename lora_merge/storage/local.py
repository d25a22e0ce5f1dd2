"""Files of this machine: opened for reading, and known by what the kernel says of them."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING

from lora_merge.core.identity import FileIdentity
from lora_merge.errors import CheckpointError
from lora_merge.storage import input_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLOEXEC, NONBLOCK = getattr(os, "O_CLOEXEC", 0), getattr(os, "O_NONBLOCK", 0)


@contextlib.contextmanager
def open_for_reading(path: str | Path) -> Iterator[int]:
    """Yield a descriptor for positioned reads. Every file of a stranger is opened here.

    A pipe, a device or a socket would block, or never end: they are refused, and opening one waits for nobody.

    Raises:
        CheckpointError: the file is missing, cannot be opened, or is no regular file.
        ChangedError: the run has read another file of this name (`input_files.watching`).
    """
    try:
        fd = os.open(path, os.O_RDONLY | CLOEXEC | NONBLOCK)
    except (
        OSError,
        ValueError,
    ) as exc:  # ValueError: a NUL character, or a name that the system cannot encode
        why = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise CheckpointError(str(path), "", f"cannot be opened ({why})") from exc
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise CheckpointError(str(path), "", f"is {_kind_of(mode)}", "a regular file")
        input_files.tell_opened(path, fd, identity_of(fd))
        yield fd
    finally:
        os.close(fd)


def why_no_file(path: Path) -> str:
    """Return why a path is no regular file, as the end of a sentence; empty for one that is. Nothing is opened."""
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        return f"cannot be opened ({exc.strerror})"
    return "" if stat.S_ISREG(mode) else f"is {_kind_of(mode)}, expected a regular file"


def _kind_of(mode: int) -> str:
    """Return what an inode is, in words, by its mode."""
    kinds = {
        stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "a special file")


def identity_of(fd: int) -> FileIdentity:
    """Return which file a descriptor is of, as it is now."""
    status = os.fstat(fd)
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

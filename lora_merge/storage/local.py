"""Files of this machine: opened for reading, and identified by what the kernel says of them."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from lora_merge.core.identity import FileIdentity
from lora_merge.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_TRANSFER_BYTES = 1 << 30
"""The most bytes of one system call; the kernel's own limit is 0x7ffff000."""

UNABLE = frozenset({errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
"""Error codes of a filesystem, a kernel or a sandbox that does not know a call, or forbids it."""

CLOEXEC, _NONBLOCK = getattr(os, "O_CLOEXEC", 0), getattr(os, "O_NONBLOCK", 0)

_PLAIN_READ_BYTES = 1 << 22
"""The most bytes of one ``pread``, which allocates what it returns."""


class LocalSource:
    """An open file of this machine (a `storage.sources.Source`).

    Args:
        text: its path, as messages have it.
        fd: a descriptor of it, which stays open for as long as this is used.
    """

    def __init__(self, text: str, fd: int) -> None:
        self.text, self.fd = text, fd
        self.version = identity_of(fd)
        self.nbytes = self.version.size

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Read into a buffer from an offset, with one call; return the number of bytes, 0 at the end.

        Raises:
            OSError: they cannot be read.
        """
        buffer = buffer[:MAX_TRANSFER_BYTES]
        try:
            try:
                return os.preadv(self.fd, [buffer], offset)
            except OSError as exc:
                # A real fault of the disk is raised at once.
                if exc.errno not in UNABLE:
                    raise
            # Python's `os.preadv` uses ``preadv2``, which some filesystems and sandboxes refuse; all know ``pread``.
            data = os.pread(self.fd, min(len(buffer), _PLAIN_READ_BYTES), offset)
        except OverflowError:  # no file is as long as that
            return 0
        buffer[: len(data)] = data
        return len(data)

    def ahead(self, start: int, nbytes: int) -> None:
        """Ask the kernel to read a range ahead (``POSIX_FADV_WILLNEED``); a refusal is ignored."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.fd, start, nbytes, os.POSIX_FADV_WILLNEED)


class Local:
    """The storage of this machine (a `storage.sources.Scheme`): texts are paths."""

    @contextlib.contextmanager
    def open(self, text: str) -> Iterator[LocalSource]:
        """Open a regular file. Pipes, devices and sockets are refused: reading one would block, or never end.

        Raises:
            CheckpointError: the file is missing, cannot be opened, or is not a regular file.
        """
        try:
            # O_NONBLOCK: opening a pipe without a writer would wait for ever.
            fd = os.open(text, os.O_RDONLY | CLOEXEC | _NONBLOCK)
        except (OSError, ValueError) as exc:  # ValueError: a NUL character, or a name that cannot be encoded
            why = exc.strerror if isinstance(exc, OSError) else str(exc)
            raise CheckpointError(text, "", f"cannot be opened ({why})") from exc
        try:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode):
                raise CheckpointError(text, "", f"is {_kind_of(mode)}", "a regular file")
            yield LocalSource(text, fd)
        finally:
            os.close(fd)

    def version_at(self, text: str) -> FileIdentity:
        """Return the identity of the file that has a name now, links followed.

        Raises:
            OSError: it does not exist, or cannot be looked at.
        """
        return _identity(os.stat(text))  # noqa: PTH116 - of a text, thousands of times


LOCAL = Local()


def identity_of(fd: int) -> FileIdentity:
    """Return the identity of an open file as it is now: device, inode, size, mtime and ctime in nanoseconds."""
    return _identity(os.fstat(fd))


def _identity(status: os.stat_result) -> FileIdentity:
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def why_no_file(path: Path) -> str:
    """Return why a path is not a regular file, as the end of a sentence; empty when it is one. The file is not
    opened.
    """
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        return f"cannot be opened ({exc.strerror})"
    return "" if stat.S_ISREG(mode) else f"is {_kind_of(mode)}, expected a regular file"


def _kind_of(mode: int) -> str:
    """Return the kind of an inode in words, with its article."""
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "a special file")

"""Directories and files reached by descriptors: each name is one step, and no step follows a link."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from pathlib import Path

_DIRECTORY = (
    os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
)
_FILE = os.O_NOFOLLOW | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)

_NO_SYNC = {
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EROFS,
    errno.EPERM,
    errno.EACCES,
    errno.EBADF,
}
"""What a filesystem answers that cannot flush a file or a directory (FUSE, network and overlay filesystems)."""


def open_directory(name: str | Path, dir_fd: int | None = None) -> int:
    """Return a descriptor of a directory; its name may not be a link.

    Args:
        name: its path.
        dir_fd: of the directory that a relative path begins in.

    Raises:
        OSError: there is none, or the name is that of something else.
    """
    return os.open(name, _DIRECTORY, dir_fd=dir_fd)


def open_regular(name: str, flags: int, dir_fd: int | None = None) -> int:
    """Return a descriptor of a regular file that is not a link; a pipe or a device does not hold up the run.

    Raises:
        OSError: there is none, or the name is that of something else.
    """
    fd = os.open(name, flags | _FILE, 0o666, dir_fd=dir_fd)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "not a regular file")


def inode_of(name: str, dir_fd: int) -> tuple[int, int] | None:
    """Return device and inode of what has a name in a directory, a link itself; None where nothing has it."""
    try:
        status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def has_any(fd: int, names: Iterable[str]) -> bool:
    """Return True where a directory has one of some files."""
    for name in names:
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.stat(name, dir_fd=fd).st_mode):
                return True
    return False


@contextlib.contextmanager
def writable(fd: int) -> Iterator[None]:
    """Let the owner write to a directory, as far as that goes; after an error it is as it was."""
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    if mode & stat.S_IRWXU == stat.S_IRWXU:
        yield
        return
    with contextlib.suppress(OSError):
        os.fchmod(fd, mode | stat.S_IRWXU)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.fchmod(fd, mode)
        raise


def is_empty(fd: int) -> bool:
    """Return True where a directory holds nothing."""
    with os.scandir(fd) as entries:
        return next(entries, None) is None


def clear(fd: int, keep: Collection[str] = (), within: str = "") -> None:
    """Remove what is in a directory, but for some files and the directories that they are in.

    A directory that is to go is closed to others first, so that nobody puts a link into it meanwhile; one that its owner
    made read-only is emptied too.

    Args:
        fd: of the directory.
        keep: relative names of files.
        within: relative name of the directory, with a slash at its end; empty for the first one.

    Raises:
        OSError: something cannot be removed.
    """
    for entry in _entries(fd):
        name = within + entry.name
        if entry.is_dir(follow_symlinks=False):
            _clear_directory(entry.name, fd, [one for one in keep if one.startswith(f"{name}/")], name)
        elif name not in keep:
            os.unlink(entry.name, dir_fd=fd)


def remove_directory(name: str, dir_fd: int) -> None:
    """Remove a directory with all that is in it.

    Raises:
        OSError: something cannot be removed, or it is not a directory.
    """
    _clear_directory(name, dir_fd, (), name)


def _clear_directory(name: str, dir_fd: int, keep: Collection[str], within: str) -> None:
    """Clear a directory in another, and remove it unless something in it is kept."""
    fd = _open_to_clear(name, dir_fd)
    try:
        with contextlib.suppress(OSError):  # it is another's, or the filesystem keeps no modes
            if not keep:
                os.fchmod(fd, stat.S_IRWXU)
        clear(fd, keep, f"{within}/")
    finally:
        os.close(fd)
    if not keep:
        os.rmdir(name, dir_fd=dir_fd)


def _entries(fd: int) -> list[os.DirEntry[str]]:
    with os.scandir(fd) as entries:
        return list(entries)


def _open_to_clear(name: str, dir_fd: int) -> int:
    try:
        return open_directory(name, dir_fd)
    except PermissionError:
        os.chmod(name, stat.S_IRWXU, dir_fd=dir_fd)
        return open_directory(name, dir_fd)


def sync(fd: int) -> None:
    """Make a file or a directory durable, where its filesystem can.

    Raises:
        OSError: the disk does not take it.
    """
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in _NO_SYNC:
            raise


Listing = dict[str, tuple[int, int, int, int]]
"""Relative name → inode, size in bytes, times of modification and of change in nanoseconds."""


def listing(fd: int) -> Listing:
    """Return every file in a directory as it is now; what nobody may look at, and what goes away meanwhile, is left out.

    Raises:
        OSError: the directory cannot be read.
    """
    found: Listing = {}
    for child, within, names in walk(fd):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=child, follow_symlinks=False)
                # each new link to a file of the base changes its ctime, and others may make some
                changed = status.st_ctime_ns if status.st_nlink == 1 else 0
                found[within + name] = (status.st_ino, status.st_size, status.st_mtime_ns, changed)
    return found


def walk(fd: int, within: str = "") -> Iterator[tuple[int, str, list[str]]]:
    """Yield each directory below and at last the one itself: a descriptor, its relative name, what is no directory in it.

    Links are never entered. What goes away meanwhile is passed over, and so is what nobody may enter.
    """
    names = []
    for entry in _entries(fd):
        if not entry.is_dir(follow_symlinks=False):
            names.append(entry.name)
            continue
        try:
            child = open_directory(entry.name, fd)
        except (FileNotFoundError, PermissionError):
            continue
        try:
            yield from walk(child, f"{within}{entry.name}/")
        finally:
            os.close(child)
    yield fd, within, names


def narrow(fd: int, allowed: int) -> None:
    """Take away permissions of a file or directory.

    A file with a second name is the base's own and stays as it is.

    Args:
        fd: of it.
        allowed: the bits that may stay.

    Raises:
        OSError: the filesystem keeps no modes.
    """
    status = os.fstat(fd)
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o777 & ~allowed and (stat.S_ISDIR(status.st_mode) or status.st_nlink == 1):
        os.fchmod(fd, mode & (allowed | 0o7000))

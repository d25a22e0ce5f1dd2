"""Directories and files opened by descriptor, one name at a time, never through a link."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from pathlib import Path

# O_NOFOLLOW is what makes a step safe where others may write. O_NONBLOCK: opening a pipe or a device must not
# wait.
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
"""Error codes of filesystems that cannot flush a file or a directory (FUSE, network and overlay filesystems)."""


def open_directory(name: str | Path, dir_fd: int | None = None) -> int:
    """Return a descriptor of a directory. Its name may not be a link.

    Args:
        name: its path.
        dir_fd: of the directory that a relative path begins in.

    Raises:
        OSError: it does not exist, or is something else.
    """
    return os.open(name, _DIRECTORY, dir_fd=dir_fd)


def open_regular(name: str, flags: int, dir_fd: int | None = None) -> int:
    """Return a descriptor of a regular file that is not a link. A pipe or a device does not block the run: it is
    refused.

    Raises:
        OSError: it does not exist, or is something else.
    """
    # 0o666 less the umask, as any program makes files.
    fd = os.open(name, flags | _FILE, 0o666, dir_fd=dir_fd)
    # Asked of the descriptor: what has the name may be exchanged after any look at the name.
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "not a regular file")


def inode_of(name: str, dir_fd: int) -> tuple[int, int] | None:
    """Return (device, inode) of a name in a directory, of a link itself; None where nothing has the name."""
    try:
        status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def has_any(fd: int, names: Iterable[str]) -> bool:
    """Return True when a directory holds at least one of some files, as a regular file."""
    for name in names:
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.stat(name, dir_fd=fd).st_mode):
                return True
    return False


@contextlib.contextmanager
def writable(fd: int) -> Iterator[None]:
    """Give the owner permission to write to a directory, where the filesystem allows. An error in the block restores
    the mode.
    """
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
    """Return True when a directory has no entry."""
    with os.scandir(fd) as entries:
        return next(entries, None) is None


def clear(fd: int, keep: Collection[str] = (), within: str = "") -> None:
    """Remove everything in a directory, except some files and the directories that they are in.

    A directory that will be removed is closed to others first, so that no link can be put into it meanwhile. One that
    its owner made read-only is emptied too.

    Args:
        fd: of the directory.
        keep: relative names of files.
        within: relative name of the directory, with a slash at its end; empty for the first one.

    Raises:
        OSError: something cannot be removed.
    """
    # The entries are listed first: removing while scanning may skip some.
    for entry in _entries(fd):
        name = within + entry.name
        if entry.is_dir(follow_symlinks=False):
            _clear_directory(entry.name, fd, [one for one in keep if one.startswith(f"{name}/")], name)
        elif name not in keep:
            os.unlink(entry.name, dir_fd=fd)


def remove_directory(name: str, dir_fd: int) -> None:
    """Remove a directory and everything in it, never through a link.

    Raises:
        OSError: something cannot be removed, or it is not a directory.
    """
    _clear_directory(name, dir_fd, (), name)


def _clear_directory(name: str, dir_fd: int, keep: Collection[str], within: str) -> None:
    """Clear a directory, then remove it unless a file in it is kept."""
    fd = _open_to_clear(name, dir_fd)
    try:
        with contextlib.suppress(OSError):  # it is another's, or the filesystem keeps no modes
            # Closed to others first, so that no link is put into it between listing and removal.
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
        # Its owner made it read-only, or closed it.
        os.chmod(name, stat.S_IRWXU, dir_fd=dir_fd)
        return open_directory(name, dir_fd)


def sync(fd: int) -> None:
    """Make a file or a directory durable. A filesystem that cannot flush is left alone.

    Raises:
        OSError: the disk refused the data.
    """
    try:
        os.fsync(fd)
    except OSError as exc:
        # Anything else means that data may be lost: ENOSPC and EIO above all.
        if exc.errno not in _NO_SYNC:
            raise


Listing = dict[str, tuple[int, int, int, int]]
"""Relative name → inode, size in bytes, times of modification and of change in nanoseconds."""


def listing(fd: int) -> Listing:
    """Return every file below a directory as it is now. Directories that may not be entered, and files that vanish
    meanwhile, are left out.

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
    """Yield every directory below, and last the directory itself: descriptor, relative name, names of its entries
    that are not directories.

    Links are never entered. Directories that vanish meanwhile, or may not be entered, are left out.
    """
    names = []
    for entry in _entries(fd):
        if not entry.is_dir(follow_symlinks=False):
            names.append(entry.name)
            continue
        try:
            child = open_directory(entry.name, fd)
        # Another program's, or gone meanwhile.
        except (FileNotFoundError, PermissionError):
            continue
        try:
            yield from walk(child, f"{within}{entry.name}/")
        finally:
            os.close(child)
    yield fd, within, names


def narrow(fd: int, allowed: int) -> None:
    """Take permissions away from a file or a directory.

    A file with a second name is the base's own and stays as it is.

    Args:
        fd: of it.
        allowed: the bits that may stay.

    Raises:
        OSError: the filesystem keeps no modes.
    """
    status = os.fstat(fd)
    mode = stat.S_IMODE(status.st_mode)
    # A second name is a hard link to a file of the base: its mode is the base's too.
    if mode & 0o777 & ~allowed and (stat.S_ISDIR(status.st_mode) or status.st_nlink == 1):
        os.fchmod(fd, mode & (allowed | 0o7000))

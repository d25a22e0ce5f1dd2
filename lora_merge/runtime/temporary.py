"""Temporary folders that live as long as a value: removed with its last reference, at the end of the process, or by the
next process where this one was killed.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PREFIX = "lora-merge-copy-"
SPOOLS = Path("/var/tmp")  # noqa: S108 - folders with random names are made in it
"""Where large files wait, which is on a disk."""

_LOCK = ".lock"
"""A file in each folder that its process holds a lock on: the kernel frees it whatever ends the process."""

_FILES = "files"
"""The folder in it that is handed out."""

_FOLDERS: set[weakref.finalize] = set()  # type: ignore[type-arg] # of objects of any kind


def folder_for(owner: object, place: Path | None = None) -> Path:
    """Return a new empty folder below the folder for temporary files. It is removed when its owner is.

    Args:
        owner: any object that can have weak references.
        place: another folder than the one for temporary files.

    Raises:
        OSError: it cannot be made.
    """
    import tempfile  # few runs need it

    place = place or Path(tempfile.gettempdir())
    remove_left_behind(place)
    # Resolved, since readers resolve paths too, and the two are compared.
    home = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place)).resolve()
    fd = _locked(home / _LOCK, os.O_CREAT)
    folder = home / _FILES
    folder.mkdir()
    _FOLDERS.add(weakref.finalize(owner, _remove, str(home), fd, os.getpid()))
    return folder


def remove_left_behind(place: Path | None = None) -> None:
    """Remove the folders of processes that were killed.

    Args:
        place: where they made them; default: wherever this program makes some.
    """
    import tempfile

    if place is None:
        for one in {Path(tempfile.gettempdir()), SPOOLS}:
            remove_left_behind(one)
        return
    for left in _left_behind(place):
        _remove_all(left)


@contextlib.contextmanager
def temporary_folder(place: Path | None = None) -> Iterator[Path]:
    """Have a new empty folder while the block runs. Where the process is killed, the next one removes it.

    Args:
        place: another folder than the one for temporary files.

    Raises:
        OSError: it cannot be made.
    """
    owner = _Block()
    try:
        yield folder_for(owner, place)
    finally:
        for one in list(_FOLDERS):
            if (alive := one.peek()) and alive[0] is owner:
                one()


class _Block:
    """Owns the folder of a block."""


def remove_folders() -> None:
    """Remove all of this process's folders. For the end of a process that ends without its interpreter."""
    for one in list(_FOLDERS):
        one()


def _remove(home: str, fd: int | None, process: int) -> None:
    # A process that was forked has the same references, and is not the folder's owner.
    if os.getpid() != process:
        return
    _remove_all(Path(home))
    if fd is not None:
        os.close(fd)


def _remove_all(home: Path) -> None:
    """Remove a folder, its lock last: where the process is killed meanwhile, the next one finds by the lock what is left."""
    import shutil

    shutil.rmtree(home / _FILES, ignore_errors=True)
    shutil.rmtree(home, ignore_errors=True)


def _left_behind(place: Path) -> Iterator[Path]:
    """Yield folders of processes that are gone."""
    with contextlib.suppress(OSError):
        for home in place.glob(f"{_PREFIX}*"):
            fd = _locked(home / _LOCK)
            if fd is not None:
                try:
                    yield home
                finally:
                    os.close(fd)


def _locked(path: Path, flags: int = 0) -> int | None:
    """Return a descriptor of a file that this process has locked; None where it cannot."""
    import fcntl

    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd

"""Ownership of directories: whether a run may use one that exists, and which permissions the output gets."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import ADAPTER_CONFIG, CONFIG_FILE
from lora_merge.errors import WriteError
from lora_merge.storage.objects.urls import path_here

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_ALL = 0o777
_CLASSES = ((stat.S_IRGRP, stat.S_IXGRP, stat.S_IRWXG), (stat.S_IROTH, stat.S_IXOTH, stat.S_IRWXO))
"""For the group and for everybody: the bit to read, the bit to enter, and all bits."""

_MODE_OF_SAFETENSORS = 0o600
"""Mode of every file that safetensors 0.8 writes, whatever the umask is (huggingface/safetensors#782)."""


def take(fd: int, path: Path, parent: int, *, is_new: bool) -> None:
    """Check that a directory belongs to this user alone, and close it to others.

    Some filesystems show one owner, or one mode, for everything (vfat, shares of other systems, NFS that maps root to
    another user). There it is enough that the directory has the owner and mode that a new file gets.

    Args:
        fd: of the directory.
        path: its path.
        parent: a descriptor of the directory that it is in.
        is_new: it was just created by this run.

    Raises:
        WriteError: it is another user's, or others may write to it.
    """
    status = os.fstat(fd)
    mode = stat.S_IMODE(status.st_mode)
    # A file is made for the comparison only where the owner differs.
    if status.st_uid not in {os.geteuid(), _owner_of_new(parent) if status.st_uid != os.geteuid() else -1}:
        raise WriteError(
            f"{path}: belongs to {_name(status.st_uid)}, but this run is {_name(os.geteuid())}; "
            "directories of other users are not used",
            hint="choose another --out, or ask the owner to remove the directory",
        )
    if mode & _OTHERS_WRITE and not is_new and _keeps_modes(fd, mode):
        raise WriteError(
            f"{path}: other users can write to it (mode {mode:04o}), so its content is not used",
            hint="remove it, or choose another --out",
        )
    if mode & _OTHERS:
        with contextlib.suppress(OSError):  # the filesystem keeps no modes
            os.fchmod(fd, mode & ~_OTHERS)


def _owner_of_new(parent: int) -> int:
    """Return the owner that a new file of this process gets in a directory; -1 where none can be made."""
    name = f".lora-merge-{secrets.token_hex(8)}"
    try:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=parent)
    except OSError:
        return -1
    try:
        return os.fstat(fd).st_uid
    finally:
        os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=parent)


def _keeps_modes(fd: int, mode: int) -> bool:
    """Return True when the filesystem can close a directory to others. The mode is restored."""
    try:
        os.fchmod(fd, mode & ~_OTHERS_WRITE)
        is_closed = not os.fstat(fd).st_mode & _OTHERS_WRITE
        os.fchmod(fd, mode)
    except OSError:
        return False
    return is_closed


def _name(uid: int) -> str:
    """Return a user's name and number, in words."""
    import pwd

    try:
        return f"{pwd.getpwuid(uid).pw_name} (user {uid})"
    except (KeyError, OSError):
        return f"user {uid}"


def allowed_bits(inputs: Iterable[Path], group: int) -> int:
    """Return the permission bits that the output may have: only those may read it who may read all that it is made
    of.

    The owner keeps all. The group and everybody keep theirs where they may list every directory and read every file; the
    group also has to be the same one, unless everybody may read.

    Args:
        inputs: directories and files that are read.
        group: id of the group that the output will have.
    """
    allowed = _ALL
    for path in inputs:
        try:
            status = _meant(path)
        except OSError:
            continue  # who reads it will say so
        needs_entry = stat.S_ISDIR(status.st_mode)
        may_read = [
            bool(status.st_mode & read) and (not needs_entry or bool(status.st_mode & enter))
            for read, enter, _ in _CLASSES
        ]
        # The group's bits of an input are of the input's group, which need not be the output's.
        may_read[0] = may_read[0] and (may_read[1] or status.st_gid == group)
        for permitted, (*_, bits) in zip(may_read, _CLASSES, strict=True):
            if not permitted:
                allowed &= ~bits
    return allowed


def close_folder(url: str, inputs: Iterable[Path]) -> None:
    """Close a directory that a ``file://`` URL names to those who may not read the inputs; other stores have no modes.

    It is made where it does not exist, and only if some input is closed: files in it get the modes of the umask.

    Args:
        url: of an output.
        inputs: as for `allowed_bits`.
    """
    folder = path_here(url)
    if folder is None:
        return
    with contextlib.suppress(OSError):  # no modes here; or it cannot be made, which whoever writes will say
        known = next(path for path in (folder, *folder.parents) if path.exists())
        allowed = allowed_bits(inputs, known.stat().st_gid if known == folder else os.getegid())
        if allowed != _ALL:
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(stat.S_IMODE(folder.stat().st_mode) & (allowed | 0o7000))


def _meant(path: Path) -> os.stat_result:
    """Return the status that says who may read an input: its own.

    A weight file with the mode that safetensors gives to all of them says nothing. Its folder's configuration does, which
    the same program wrote with the umask.

    Raises:
        OSError: it cannot be asked for.
    """
    status = path.stat()
    if path.suffix != ".safetensors" or stat.S_IMODE(status.st_mode) != _MODE_OF_SAFETENSORS:
        return status
    for name in (CONFIG_FILE, ADAPTER_CONFIG):
        with contextlib.suppress(OSError):
            beside = path.with_name(name).stat()
            if stat.S_ISREG(beside.st_mode) and beside.st_uid == status.st_uid:
                return beside
    return status

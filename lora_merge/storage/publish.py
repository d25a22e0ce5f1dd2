"""How a staged directory gets the output's name: in one step, and never over anything that the run has not seen.

Something may take the name while the run works. So a new name is given only where it is free, and what is moved out
of its place is checked before anything is removed.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from lora_merge.errors import WriteError
from lora_merge.storage import dirs
from lora_merge.storage.writing import write_error

if TYPE_CHECKING:
    from pathlib import Path

    from lora_merge.storage.staging import Stage

OUTPUT, REPLACED, KEPT = "output", "replaced", "kept"
"""Names in staging: the output; what had its name and is on its way out; and what only its owner may remove."""

_NOREPLACE, _EXCHANGE = 1, 2
"""The flags of Linux's ``renameat2(2)``."""

_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR}
"""Error codes of a rename to a name that is taken."""


def publish(stage: Stage) -> None:
    """Flush what is left to flush, and give the staged directory the output's name.

    Where the kernel can exchange two names, the output's name is never free in between. Others get no permission that
    they do not have for the inputs.

    Raises:
        WriteError: a flush or the rename failed; the staged directory was replaced; or something took the output's
            name. The name then has what it had before.
    """
    try:
        # Before the flush, while the directory is still closed to others.
        if stage.allowed != 0o777:
            stage.folder.narrow(stage.allowed)
        stage.folder.flush()
        with stage.home.opened() as home:
            # Others may have exchanged the directory for another one: compare inodes before it gets the name.
            if not stage.folder.is_it(dirs.inode_of(OUTPUT, home)):
                raise WriteError(
                    f"{stage.output}: another program replaced the directory of this run; no output was created"
                )
            if stage.old is None:
                _name(stage, home)
            else:
                _replace(stage, home, stage.old)
        # A rename is durable only once the directory that holds the name is.
        dirs.sync(stage.parent)
    except OSError as exc:
        raise write_error(stage.out, exc) from exc
    if not stage.is_published():
        raise WriteError(
            f"{stage.out}: another program replaced the output",
            hint="choose an --out where other users cannot write, and run again",
        )


def _name(stage: Stage, home: int) -> None:
    """Give the output a name that is free. An empty directory may have it: a plain rename replaces no other kind."""
    try:
        if not renamed((OUTPUT, home), (stage.out.name, stage.parent), _NOREPLACE):
            os.rename(OUTPUT, stage.out.name, src_dir_fd=home, dst_dir_fd=stage.parent)
    except OSError as exc:
        if exc.errno in _TAKEN:
            raise _taken(stage.out) from exc
        raise


def _taken(out: Path) -> WriteError:
    return WriteError(
        f"{out}: already exists: another program created or changed it during this run",
        hint="move it away and run again, or choose another --out",
    )


def _replace(stage: Stage, home: int, old: int) -> None:
    """Put the output in the place of the directory that had its name when the run began, and of no other one."""
    name = stage.out.name
    # The old output may be gone by now: then the name is free.
    current = dirs.inode_of(name, stage.parent)
    if current is None:
        _name(stage, home)
        return
    if not _is_old(stage, name, stage.parent, old):
        raise _taken(stage.out)
    with dirs.writable(old):  # the kernel changes `..` in a directory that it moves
        if not renamed((OUTPUT, home), (name, stage.parent), _EXCHANGE):
            _replace_in_steps(stage, home, old)
        # After the exchange the old directory is in staging, out of reach of others: look at it again, and
        # give it back if it is not the one that may go.
        elif not _is_old(stage, OUTPUT, home, old):
            if not renamed((OUTPUT, home), (name, stage.parent), _EXCHANGE):
                os.rename(OUTPUT, KEPT, src_dir_fd=home, dst_dir_fd=home)
                raise _lost_place(stage, KEPT)
            raise _taken(stage.out)


def _replace_in_steps(stage: Stage, home: int, old: int) -> None:
    """Without an exchange of names: move the old directory away, check it, name the output, or move it back.

    A run that is killed in between is put right by the next (`recover`).
    """
    os.rename(stage.out.name, REPLACED, src_dir_fd=stage.parent, dst_dir_fd=home)
    try:
        if not _is_old(stage, REPLACED, home, old):
            raise _taken(stage.out)
        _name(stage, home)
    except (OSError, WriteError):
        try:
            os.rename(REPLACED, stage.out.name, src_dir_fd=home, dst_dir_fd=stage.parent)
        except OSError as exc:
            raise _lost_place(stage, REPLACED) from exc
        raise


def _lost_place(stage: Stage, name: str) -> WriteError:
    return WriteError(
        f"{stage.out}: another program changed it during the replacement; the previous directory is {stage.root / name}",
        hint="move that directory back to its place",
    )


def _is_old(stage: Stage, name: str, dir_fd: int, old: int) -> bool:
    """Return True when a name is that of the directory that may be replaced, and no file in it is new or changed."""
    status = os.fstat(old)
    if dirs.inode_of(name, dir_fd) != (status.st_dev, status.st_ino) or not dirs.has_any(old, stage.marks):
        return False
    # Inode, size and mtime; ctime moves with every link that others make.
    return all(stage.seen.get(file, ())[:3] == now[:3] for file, now in dirs.listing(old).items())


def recover(home: int, parent: int, out: Path, root: Path) -> None:
    """Repair what a run left that was killed while it named its output.

    Args:
        home: a descriptor of its staging directory.
        parent: a descriptor of the directory that the output is in.
        out: the output.
        root: the staging directory.

    Raises:
        OSError: it cannot be repaired.
        WriteError: it is not clear which directory should have the name.
    """
    if dirs.inode_of(REPLACED, home) is None:
        return
    if dirs.inode_of(out.name, parent) is None:
        os.rename(REPLACED, out.name, src_dir_fd=home, dst_dir_fd=parent)
    elif dirs.inode_of(OUTPUT, home) is None:  # the output has its name, and the old one was looked at
        dirs.remove_directory(REPLACED, home)
    else:
        raise WriteError(
            f"{root / REPLACED}: is an earlier {out}, which an interrupted run had moved; another program has created {out} since",
            hint="move that directory back to its place, or remove it",
        )


def renamed(one: tuple[str, int], other: tuple[str, int], flag: int) -> bool:
    """Rename in one step: either only if the new name is free, or by exchanging the two names.

    Args:
        one: a name, and a descriptor of the directory that it is in.
        other: the other one.
        flag: which of the two.

    Returns:
        False where it was not done: one is gone or the other is there, or the kernel, the filesystem or a sandbox cannot do
        it (Linux can since 3.15). Nothing has changed then, and the plain way says why.
    """
    import ctypes

    try:
        # glibc has the function since 2.28; Python has none for it.
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    arguments = (one[1], os.fsencode(one[0]), other[1], os.fsencode(other[0]), flag)
    return bool(renameat2(*arguments) == 0)

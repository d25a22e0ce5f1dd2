"""Staging: an output is built beside its name, checked, flushed, then renamed in one step.

Until the rename, what had the output's name before is untouched. What an interrupted run has written stays, with a
journal that says how far it came, until another run resumes it or starts over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import CONFIG_FILE
from lora_merge.errors import ChangedError, CheckpointError, WriteError
from lora_merge.storage import dirs, journal, owners
from lora_merge.storage.folder import Folder
from lora_merge.storage.publish import KEPT, OUTPUT, REPLACED, publish, recover
from lora_merge.storage.replaceable import SUFFIX, check_replaceable, check_writable, staging_path
from lora_merge.storage.spool import FACTORS
from lora_merge.storage.writing import write_error
from lora_merge.words import counted, listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "SUFFIX",
    "Stage",
    "check_replaceable",
    "check_writable",
    "clear_spent",
    "publish",
    "staging",
    "staging_path",
    "stale_bytes",
]

_RESUMABLE = (KeyboardInterrupt, WriteError, CheckpointError)
"""Errors that say nothing against what the run has written: whole files stay."""

_MOST_TRIES = 100
"""Attempts to lock a directory that other runs make and remove at the same time."""

_OWN = {OUTPUT, REPLACED, FACTORS, journal.FILE, journal.FRESH_FILE}
"""All names that runs put into staging."""

_HIDDEN = (".nfs", ".fuse_hidden")
"""Prefixes of names that network filesystems give to removed files that are still open."""


def stale_bytes(out: Path) -> int:
    """Return the bytes that an interrupted run left in staging, which the next run frees; 0 where there is nothing."""
    staging = staging_path(out)
    try:
        if not stat.S_ISDIR(staging.lstat().st_mode):
            return 0
        return sum(path.lstat().st_size for path in staging.rglob("*"))
    except OSError:
        return 0


@dataclass(frozen=True, slots=True)
class Stage:
    """The staging directory of one run, locked, and what is known of the output's name."""

    out: Path
    """The output's name."""

    home: Folder
    """The staging directory."""

    folder: Folder
    """The directory in it that will be the output."""

    parent: int
    """A descriptor of the directory that holds both names."""

    old: int | None
    """A descriptor of the directory that has the output's name and may be replaced; None where there is none."""

    seen: dirs.Listing
    """Its files when the run began; a file that is new or changed at the end stops the replacement."""

    marks: tuple[str, ...]
    """File names; one of them must still be there when it is replaced."""

    allowed: int
    """The permission bits that the output may have."""

    @property
    def root(self) -> Path:
        """Path of the staging directory."""
        return self.home.path

    @property
    def output(self) -> Path:
        """Path of the directory in it that will be the output."""
        return self.folder.path

    @property
    def journal(self) -> Path:
        """Path of the journal."""
        return self.root / journal.FILE

    def removable(self) -> Iterator[tuple[int, int]]:
        """Yield (device, inode) of the directories that this run may remove: its own, and the one that it may
        replace.
        """
        yield self.folder.device, self.folder.inode
        if self.old is not None:
            status = os.fstat(self.old)
            yield status.st_dev, status.st_ino

    def is_published(self) -> bool:
        """Return True when the output's name leads to the directory that this run made."""
        try:
            status = self.out.lstat()
        except OSError:
            return False
        return self.folder.is_it((status.st_dev, status.st_ino))


@contextlib.contextmanager
def staging(
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    marks: tuple[str, ...] = (CONFIG_FILE,),
    inputs: Iterable[Path] = (),
) -> Iterator[Stage]:
    """Yield a directory beside the output, locked against a second run and closed to other users.

    What an interrupted run left there is cleared first, unless it is to be resumed. Leaving with an error clears it
    again, but after an interrupt or a fault of the disk what is whole is kept, and the error has a note about it.

    Args:
        out: the output's path.
        resume: keep what an interrupted run left.
        overwrite: what has the output's name now may be replaced, and nothing that comes there later.
        marks: file names; a directory with one of them is an output of this kind.
        inputs: directories and files that are read: who may not read one of them may not read the output.

    Raises:
        WriteError: another run or another user holds it, it cannot be made, or the output's name is taken.
    """
    path = staging_path(out)
    with contextlib.ExitStack() as held:
        parent = _opened_parent(out.parent)
        held.callback(os.close, parent)
        fd = _lock(path, parent)
        held.callback(os.close, fd)
        try:
            # First put right what a run left that was killed while it renamed: `_prepare` would clear it.
            recover(fd, parent, out, path)
            old = _opened_old(out, parent, held, overwrite=overwrite, marks=marks)
            folder = _prepare(path, fd, held, resume=resume)
            seen = {} if old is None else dirs.listing(old)
            allowed = owners.allowed_bits(inputs, os.fstat(fd).st_gid)
            stage = Stage(out, Folder.of(path, fd), folder, parent, old, seen, marks, allowed)
        except BaseException as exc:
            _remove_empty(path, fd, parent)
            if isinstance(exc, OSError):
                raise write_error(path, exc) from exc
            raise
        try:
            yield stage
        # Also interrupts: they keep finished tensors.
        except BaseException as exc:
            is_fault = isinstance(exc, _RESUMABLE) and not isinstance(exc, ChangedError)
            # Without a finished tensor there is nothing to resume. An interrupt may also strike after the output has
            # its name, while the rest of staging is taken down.
            n_kept = journal.count(stage.home) if is_fault and not stage.is_published() else 0
            if n_kept:
                exc.add_note(
                    f"run again with --resume to continue: {counted(n_kept, 'finished tensor')} kept in {path}; "
                    "without --resume the run starts over"
                )
            else:
                _remove(stage, fd)
            raise
        _remove_despite_interrupt(stage, fd)


def clear_spent(out: Path, marks: tuple[str, ...], *, resumes: bool) -> None:
    """Remove what a killed run left in staging beside its finished output, as far as possible.

    That is nothing, or what had the output's name before. What was begun and not sealed stays, since a run may resume
    it.

    Args:
        out: the output, which is whole.
        marks: file names; a directory with one of them is an output of this kind.
        resumes: runs of this kind resume what is staged.
    """
    root = staging_path(out)
    try:
        is_begun = (root / OUTPUT).is_dir() and any((root / OUTPUT).iterdir())
        is_sealed = any((root / OUTPUT / mark).is_file() for mark in marks)
        has_journal = (root / journal.FILE).is_file()  # without it no run goes on
        if not root.is_dir() or (resumes and has_journal and is_begun and not is_sealed):
            return
        with staging(out, overwrite=True, marks=marks):
            pass
    except (OSError, WriteError):  # another run has it, or nobody may
        return


def _opened_parent(path: Path) -> int:
    """Return a descriptor of the directory that holds the output; it is made if it does not exist.

    Raises:
        WriteError: it cannot be made or opened.
    """
    try:
        for place in reversed(
            (path, *path.parents)
        ):  # Path.mkdir goes down by recursion, which some paths exceed
            if not place.is_dir():
                place.mkdir(exist_ok=True)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)  # links that lead there are the user's own
    except OSError as exc:
        raise write_error(path, exc) from exc


def _opened_old(
    out: Path, parent: int, held: contextlib.ExitStack, *, overwrite: bool, marks: tuple[str, ...]
) -> int | None:
    """Return a descriptor of the directory that has the output's name and may be replaced; None where there is none.

    It is open until the end, so that nothing else gets its inode.

    Raises:
        OSError: it cannot be looked at.
        WriteError: it may not be replaced.
    """
    check_replaceable(out, overwrite=overwrite, inputs=(), marks=marks)
    if dirs.inode_of(out.name, parent) is None:
        return None
    old = dirs.open_directory(out.name, parent)
    held.callback(os.close, old)
    if dirs.is_empty(old):
        return None
    if not (overwrite and dirs.has_any(old, marks)):  # it came there after the check
        raise WriteError(f"{out}: already exists", hint="choose another --out")
    return old


def _prepare(path: Path, fd: int, held: contextlib.ExitStack, *, resume: bool) -> Folder:
    """Make the directory that will be the output. Other staged files are removed, unless the run resumes.

    Raises:
        OSError: it cannot be made.
        WriteError: there are things in staging that no run puts there.
    """
    with os.scandir(fd) as entries:
        names = sorted(entry.name for entry in entries)
    others = [name for name in names if name not in _OWN and not name.startswith(_HIDDEN)]
    # Staging is cleared with all that is in it, so a user's own files in there stop the run.
    if others:
        raise WriteError(
            f"{path}: would be cleared for this output, but contains other files: {listing(others)}",
            hint="move these files, or choose another --out",
        )
    if not resume:
        dirs.clear(fd)
    for _ in range(2):
        with contextlib.suppress(FileExistsError):
            os.mkdir(OUTPUT, dir_fd=fd)
        try:
            output = dirs.open_directory(OUTPUT, fd)
        except OSError as exc:
            if exc.errno not in {errno.ELOOP, errno.ENOTDIR}:
                raise
            os.unlink(OUTPUT, dir_fd=fd)  # a link or a file: the link goes, and what it leads to stays
        else:
            held.callback(os.close, output)
            return Folder.of(path / OUTPUT, output)
    raise WriteError(f"{path / OUTPUT}: cannot be created", hint="choose another --out")


def _remove_despite_interrupt(stage: Stage, fd: int) -> None:
    """Remove the staging directory of a finished run. No later run resumes it, so nothing else would remove it."""
    try:
        _remove(stage, fd)
    except KeyboardInterrupt:
        _remove(stage, fd)
        raise


def _remove(stage: Stage, fd: int) -> None:
    """Remove a staging directory that this run holds, as far as possible; the next run clears the rest.

    What had the output's name stays, where it could not be put back, or was never meant to be taken away.
    """
    with contextlib.suppress(OSError):
        # Another user's directory under this name is put aside, not removed.
        if dirs.inode_of(OUTPUT, fd) not in {None, *stage.removable()}:
            os.rename(OUTPUT, KEPT, src_dir_fd=fd, dst_dir_fd=fd)
        is_out = dirs.inode_of(REPLACED, fd) is not None and not stage.is_published()
        if not is_out and dirs.inode_of(KEPT, fd) is None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(journal.FILE, dir_fd=fd)  # first of all: what is left of the rest is of no use
            dirs.clear(fd)
    _remove_empty(stage.root, fd, stage.parent)


def _remove_empty(path: Path, fd: int, parent: int) -> None:
    """Remove a staging directory that is empty, if its name still leads to it."""
    with contextlib.suppress(OSError):
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(OUTPUT, dir_fd=fd)
        status = os.fstat(fd)
        if dirs.inode_of(path.name, parent) == (status.st_dev, status.st_ino):
            os.rmdir(path.name, dir_fd=parent)


def _lock(path: Path, parent: int) -> int:
    """Return a descriptor that holds the lock on the staging directory until it is closed.

    The kernel frees the lock when the process ends, however it ends: no lock is ever stale. A filesystem without
    locks goes without.

    Raises:
        WriteError: another run or another user holds it, or the directory cannot be made.
    """
    why = "another program removes it"
    for _ in range(_MOST_TRIES):
        try:
            is_new = _made(path.name, parent)
            fd = dirs.open_directory(path.name, parent)
        except FileNotFoundError as exc:
            why = exc.strerror or why
            continue  # removed between the two: its run is done
        except OSError as exc:
            if exc.errno in {errno.ELOOP, errno.ENOTDIR}:
                sentence = f"{path}: is a link or a file, expected a directory or nothing"
                raise WriteError(sentence, hint="remove it, or choose another --out") from exc
            raise write_error(path, exc) from exc
        try:
            owners.take(fd, path, parent, is_new=is_new)
            _take_lock(fd, path)
        except BaseException as exc:
            if is_new and isinstance(exc, KeyboardInterrupt):
                _remove_empty(path, fd, parent)
            os.close(fd)
            raise
        status = os.fstat(fd)
        if dirs.inode_of(path.name, parent) == (status.st_dev, status.st_ino):
            return fd
        os.close(fd)  # removed between open and lock: its run is done, take a new one
    raise WriteError(f"{path}: cannot be created ({why})", hint="choose another --out")


def _made(name: str, parent: int) -> bool:
    """Make a directory that is closed to others; return False when the name is taken."""
    try:
        os.mkdir(name, stat.S_IRWXU, dir_fd=parent)
    except FileExistsError:
        return False
    return True


def _take_lock(fd: int, path: Path) -> None:
    """Lock a staging directory, without waiting.

    Raises:
        WriteError: another run holds it.
    """
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        who = journal.owner(Folder.of(path, fd))
        raise WriteError(
            f"{path}: another run is writing this output{f' ({who})' if who else ''}",
            hint="wait for it, or choose another --out",
        ) from exc
    except OSError:
        return  # it knows no locks, or does not permit them

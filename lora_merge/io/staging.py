"""The way an output appears: built beside its name, checked, flushed, then renamed in one go.

Whatever happens before the rename, nothing stands under the output's name but what stood there before. What an
interrupted run has written stays, with the journal that says how far it came, until a run goes on from there or
begins anew.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lora_merge.core.checkpoint import CONFIG_FILE
from lora_merge.errors import ChangedError, CheckpointError, WriteError
from lora_merge.io import journal
from lora_merge.io.files import nearest_existing, write_error
from lora_merge.words import choice

if TYPE_CHECKING:
    from collections.abc import Iterator

SUFFIX = ".lora-merge-staging"

_RESUMABLE = (KeyboardInterrupt, WriteError, CheckpointError)
"""What ends a run without saying anything against what it has written."""

_MOST_TRIES = 100
"""To lock a directory that other runs make and remove."""

_PAUSE_SECONDS = 0.1
"""Between two flushes of what is still being written."""

_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
"""What a filesystem answers that knows no locks."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def staging_path(out: Path) -> Path:
    """Return the directory that an output is built in: beside it, on the same filesystem."""
    return out.with_name(out.name + SUFFIX)


def check_replaceable(
    out: Path,
    *,
    overwrite: bool,
    inputs: tuple[Path, ...],
    home: Path | None = None,
    marks: tuple[str, ...] = (CONFIG_FILE,),
) -> None:
    """Check that an output may come into being under this name.

    Args:
        out: its path.
        overwrite: what has this name may be replaced.
        inputs: what is read.
        home: one of the inputs that the output may lie in: an adapter may hold other forms of itself.
        marks: files of which one shows that a directory is an output of this kind.

    Raises:
        WriteError: it exists and may not be replaced, is another kind of directory, one of the inputs holds it
            or lies in it; or nobody may look.
    """
    for path in inputs:
        _check_apart(out, path, may_hold_it=path == home)
    try:
        if not (out.exists() or out.is_symlink()):
            return
        if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
            return
        what = _foreign(out, marks)
    except OSError as exc:  # nobody may look there, or the name is too long
        raise write_error(out, exc) from exc
    if what:
        raise WriteError(
            f"{out}: already exists and is {what}",
            hint="choose another --out, or remove it yourself: --overwrite does not replace it",
        )
    if not overwrite:
        raise WriteError(f"{out}: already exists", hint="choose another --out, or pass --overwrite")


def _check_apart(out: Path, source: Path, *, may_hold_it: bool) -> None:
    """Check that an output and an input are not in each other.

    Args:
        out: the output.
        source: the input.
        may_hold_it: the output may be in a folder of the input.

    Raises:
        WriteError: they are.
    """
    real = source.resolve()
    place = out.parent.resolve() / out.name
    hint = "choose another --out, beside the inputs"
    if real == place or place in real.parents:
        raise WriteError(f"{out}: holds the input {source}", hint=hint)
    if real in place.parents and not may_hold_it:
        raise WriteError(f"{out}: is inside the input {source}, where nothing is written", hint=hint)


def _foreign(out: Path, marks: tuple[str, ...]) -> str:
    """Return what stands under the output's name, if it is nothing that an output may replace."""
    if out.is_symlink():
        return f"a link to {out.readlink()}"
    if not out.is_dir():
        return "a file"
    if any((out / mark).is_file() for mark in marks):
        return ""
    kind = "a model checkpoint" if CONFIG_FILE in marks else "an adapter"
    return f"not {kind} (it has no {choice(marks)})"


def check_writable(out: Path) -> None:
    """Check that a directory may be made under this name: a disk that takes nothing may seem full.

    Raises:
        WriteError: it may not.
    """
    existing = nearest_existing(out.parent)
    if not existing.is_dir():
        raise WriteError(f"{out}: cannot be made, since {existing} is a file", hint="choose another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        code = errno.EROFS if is_read_only else errno.EACCES
        raise write_error(out, OSError(code, os.strerror(code)))


def stale_bytes(out: Path) -> int:
    """Return the bytes of what an interrupted run left in staging, which the next run will free."""
    staging = staging_path(out)
    try:
        return sum(path.lstat().st_size for path in staging.rglob("*"))
    except OSError:
        return 0


@dataclass(frozen=True, slots=True)
class Stage:
    """The directory that a run builds its output in, and has for itself."""

    root: Path

    @property
    def output(self) -> Path:
        """Return the directory that will be the output."""
        return self.root / "output"

    @property
    def journal(self) -> Path:
        """Return the path of the list of what is written."""
        return self.root / "journal.jsonl"


@contextlib.contextmanager
def staging(out: Path, *, resume: bool = False) -> Iterator[Stage]:
    """Yield a directory beside the output, locked against a second run.

    What an interrupted run left there is cleared first, unless it is to be resumed. Leaving with an error clears it
    again, but after an interrupt or a fault of the disk what is whole is kept, and the error has a note about it.

    Raises:
        WriteError: another run holds it, or it cannot be made.
    """
    path = staging_path(out)
    stage = Stage(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise write_error(path.parent, exc) from exc
    lock = _lock(path)
    try:
        if not resume:
            _clear(path)
        try:
            stage.output.mkdir(exist_ok=True)
        except OSError as exc:
            raise write_error(stage.output, exc) from exc
        yield stage
        _remove(path)
    except BaseException as exc:
        is_fault = isinstance(exc, _RESUMABLE) and not isinstance(exc, ChangedError)
        n_kept = journal.count(stage.journal) if is_fault else 0
        if n_kept:
            exc.add_note(
                f"what is whole stays in {path} ({n_kept} tensor{'s' * (n_kept != 1)}): --resume goes on from "
                "there, and a run without it begins anew"
            )
        else:
            _remove(path)
        raise
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    """Remove a directory that we hold, as far as that is possible; the next run clears the rest."""
    with contextlib.suppress(OSError, WriteError):
        _clear(path)
        path.rmdir()


def _lock(path: Path) -> int:
    """Return a descriptor that holds the lock on the staging directory until it is closed.

    The kernel frees the lock when the process ends, however it ends: there is no stale one. A filesystem that knows
    no locks goes without.

    Raises:
        WriteError: another run holds it, or the directory cannot be made.
    """
    import fcntl

    for _ in range(_MOST_TRIES):
        try:
            path.mkdir(exist_ok=True)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # removed between the two: its run is done
        except OSError as exc:
            raise write_error(path, exc) from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            if exc.errno in _NO_LOCKS:
                return fd
            os.close(fd)
            who = journal.owner(Stage(path).journal)
            raise WriteError(
                f"{path}: another run is writing this output{f' ({who})' if who else ''}",
                hint="wait for it, or choose another --out",
            ) from exc
        with contextlib.suppress(OSError):
            if path.stat().st_ino == os.fstat(fd).st_ino:
                return fd
        os.close(fd)  # removed between open and lock: its run is done, take a new one
    raise WriteError(f"{path}: cannot be made", hint="choose another --out")


def _clear(path: Path) -> None:
    """Empty a directory that we hold.

    Raises:
        WriteError: something in it cannot be removed.
    """
    import shutil

    try:
        for child in path.iterdir():
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()
    except OSError as exc:
        raise write_error(path, exc) from exc


class Flushing:
    """Sends what is staged on its way to the disk while it is being written, and makes it durable.

    A context: after an error in its block nobody waits for the disk, since what is staged will be cleared.
    """

    def __init__(self, staged: Path) -> None:
        self._staged = staged
        self._failure: OSError | None = None
        self._resting, self._complete, self._over = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._flush, name="flush", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._complete.set()

    def _flush(self) -> None:
        """Flush again and again, and one last time what is complete."""
        try:
            while not self._complete.wait(_PAUSE_SECONDS):
                if not self._resting.is_set():
                    _flush(self._staged)
            if not self._over.is_set():
                _flush(self._staged)
        except OSError as exc:
            self._failure = exc

    def rest(self) -> None:
        """Leave the disk alone until `wait`: to flush a file holds up those who write to it past the page cache."""
        self._resting.set()

    def wait(self) -> None:
        """Wait until all of it is durable; nothing may be written any more.

        Raises:
            WriteError: the disk does not take it.
        """
        self._complete.set()
        self._thread.join()
        if self._failure:
            raise write_error(self._staged, self._failure) from self._failure


def publish(staged: Path, out: Path) -> None:
    """Flush the staged output to the disk, or what `Flushing` left of that, and give it its name, replacing what had it.

    Where the kernel can exchange two names, there is no moment without an output.

    Raises:
        WriteError: a flush or the rename failed; the old output, if any, stands as before.
    """
    try:
        _flush(staged)
        if out.is_dir() and any(out.iterdir()):
            _replace(staged, out)
        else:
            staged.rename(out)
        _fsync(out.parent)
    except OSError as exc:
        raise write_error(out, exc) from exc


def _replace(staged: Path, out: Path) -> None:
    """Put the staged directory in the place of another, which is staged then, or removed."""
    if _exchange(staged, out):
        return
    old = out.with_name(out.name + ".lora-merge-replaced")
    _discard(old)  # of a run that could not
    out.rename(old)
    try:
        staged.rename(out)
    except OSError:
        old.rename(out)
        raise
    _discard(old)


def _discard(root: Path) -> None:
    """Remove a directory, as far as that goes; its owner may have made it read-only."""
    import shutil

    for directory, _, _ in os.walk(root):
        with contextlib.suppress(OSError):
            os.chmod(directory, stat.S_IRWXU)  # noqa: PTH101 - what os.walk gives
    shutil.rmtree(root, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return False where the platform cannot (Linux 3.15 can)."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(renameat2(*arguments) == 0)


def _flush(root: Path) -> None:
    """Make every file and directory below a root durable."""
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            _fsync(Path(directory, name))
        _fsync(Path(directory))


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

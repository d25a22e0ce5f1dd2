"""The way an output appears: built beside its name, checked, flushed, then renamed in one go.

Whatever happens before the rename, nothing stands under the output's name but what stood there before.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lora_merge.errors import WriteError
from lora_merge.io.files import write_error

if TYPE_CHECKING:
    from collections.abc import Iterator

SUFFIX = ".lora-merge-staging"

_PAUSE_SECONDS = 0.1
"""Between two flushes of what is still being written."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def staging_path(out: Path) -> Path:
    """Return the directory that an output is built in: beside it, on the same filesystem."""
    return out.with_name(out.name + SUFFIX)


def check_replaceable(out: Path, *, overwrite: bool, inputs: tuple[Path, ...]) -> None:
    """Check that an output may come into being under this name.

    Raises:
        WriteError: it exists and may not be replaced, is no checkpoint, or holds one of the inputs.
    """
    for path in inputs:
        if path == out or out in path.parents:
            raise WriteError(f"{out}: holds the input {path}", hint="choose another --out")
    if not (out.exists() or out.is_symlink()):
        return
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        return
    if not overwrite:
        raise WriteError(f"{out}: already exists", hint="choose another --out, or pass --overwrite")
    if out.is_symlink() or not (out / "config.json").is_file():
        raise WriteError(
            f"{out}: is no model checkpoint (it has no config.json), so --overwrite leaves it alone",
            hint="remove it yourself, or choose another --out",
        )


def stale_bytes(out: Path) -> int:
    """Return the bytes of what an interrupted run left in staging, which the next run will free."""
    staging = staging_path(out)
    try:
        return sum(path.lstat().st_size for path in staging.rglob("*"))
    except OSError:
        return 0


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Yield an empty directory beside the output, locked against a second run.

    What an interrupted run left there is cleared first. Leaving with an error clears it again.

    Raises:
        WriteError: another run holds it, or it cannot be made.
    """
    path = staging_path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise write_error(path.parent, exc) from exc
    lock = _lock(path)
    try:
        _clear(path)
        yield path
    except BaseException:
        with contextlib.suppress(OSError, WriteError):
            _clear(path)
            path.rmdir()
        raise
    finally:
        os.close(lock)


def _lock(path: Path) -> int:
    """Return a descriptor that holds the lock on the staging directory until it is closed.

    The kernel frees the lock when the process ends, however it ends.
    """
    import fcntl

    while True:
        try:
            path.mkdir(exist_ok=True)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as exc:
            raise write_error(path, exc) from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(fd)
            raise WriteError(
                f"{path}: another run is writing this output", hint="wait for it, or choose another --out"
            ) from exc
        with contextlib.suppress(OSError):
            if path.stat().st_ino == os.fstat(fd).st_ino:
                return fd
        os.close(fd)  # renamed away between open and lock: its run is done, take a new one


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
        self._complete, self._over = threading.Event(), threading.Event()
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
                _flush(self._staged)
            if not self._over.is_set():
                _flush(self._staged)
        except OSError as exc:
            self._failure = exc

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
    """Put the staged directory in the place of another, and remove that."""
    import shutil

    old = staged
    if not _exchange(staged, out):
        old = out.with_name(out.name + ".lora-merge-replaced")
        out.rename(old)
        try:
            staged.rename(out)
        except OSError:
            old.rename(out)
            raise
    shutil.rmtree(old, ignore_errors=True)  # what stays is cleared by the next run


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

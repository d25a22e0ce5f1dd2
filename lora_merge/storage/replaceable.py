"""May an output have a name: what has it now, is an input inside, can it be written."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from lora_merge.core.checkpoint import CONFIG_FILE
from lora_merge.errors import WriteError
from lora_merge.storage.user_paths import nearest_existing
from lora_merge.storage.writing import write_error
from lora_merge.words import choice

SUFFIX = ".lora-merge-staging"


def staging_path(out: Path) -> Path:
    """Return the directory that an output is built in: beside it, so that a rename can publish it."""
    return out.with_name(out.name + SUFFIX)


def check_replaceable(
    out: Path,
    *,
    overwrite: bool,
    inputs: tuple[Path, ...],
    home: Path | None = None,
    marks: tuple[str, ...] = (CONFIG_FILE,),
) -> None:
    """Check that an output may be made under this name.

    Args:
        out: its path.
        overwrite: a directory that has this name may be replaced.
        inputs: directories and files that are read.
        home: an input that the output may be inside of: an adapter's folder may hold other forms of the adapter.
        marks: file names; a directory with one of them is an output of this kind.

    Raises:
        WriteError: it exists and may not be replaced, is another kind of directory, one of the inputs is inside it or
            around it; or the name cannot be looked at.
    """
    for path in inputs:
        _check_apart(out, path, may_hold_it=path == home)
        # Staging is cleared before a run: an input inside would be removed.
        if _holds(staging_path(out), path):
            sentence = (
                f"{out}: needs {staging_path(out)} as a temporary directory, but the input {path} is in it"
            )
            raise WriteError(sentence, hint="choose another --out, or move the input")
    try:
        if not (out.exists() or out.is_symlink()):
            return
        # An empty directory may be replaced without --overwrite: nothing is lost.
        if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
            return
        what = _foreign(out, marks)
    except OSError as exc:  # no permission, or the name is too long
        raise write_error(out, exc) from exc
    if what:
        hint = "choose another --out, or delete it yourself: --overwrite does not replace it"
        # Parts of an output lock it as a store's output is locked.
        if (staging_path(out) / "run.json").is_file():
            hint = f"it was begun with --part: finish its parts and --seal, or delete it and {staging_path(out)} yourself"
        raise WriteError(f"{out}: already exists and is {what}", hint=hint)
    if not overwrite:
        raise WriteError(f"{out}: already exists", hint="choose another --out, or pass --overwrite")


def _check_apart(out: Path, source: Path, *, may_hold_it: bool) -> None:
    """Check that neither of an output and an input is inside the other.

    Args:
        out: the output.
        source: the input.
        may_hold_it: the output may be in a folder of the input.

    Raises:
        WriteError: one is.
    """
    hint = "choose another --out, outside of the inputs"
    if _holds(out, source):
        raise WriteError(f"{out}: contains the input {source}", hint=hint)
    if not may_hold_it and _holds(source, out.parent):
        raise WriteError(f"{out}: is inside the input {source}", hint=hint)


def _holds(place: Path, path: Path) -> bool:
    """Return True when a path is a place or below it, however links and mounts lead there."""
    real, place = Path(os.path.realpath(path)), Path(os.path.realpath(place))  # which bears links in a circle
    if place == real or place in real.parents:
        return True
    try:
        status = place.stat()
    except OSError:
        return False
    # Paths do not tell of bind mounts, inodes do.
    return stat.S_ISDIR(status.st_mode) and any(_is_inode(above, status) for above in (real, *real.parents))


def _is_inode(path: Path, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.lstat(), status)
    except OSError:
        return False


def _foreign(out: Path, marks: tuple[str, ...]) -> str:
    """Return what has the output's name, if an output may not replace it; empty if it may."""
    if out.is_symlink():
        return f"a link to {out.readlink()}"
    if not out.is_dir():
        return "a file"
    if any((out / mark).is_file() for mark in marks):
        return ""
    kind = "a model checkpoint" if CONFIG_FILE in marks else "an adapter"
    return f"not {kind} (it has no {choice(marks)})"


def check_writable(out: Path) -> None:
    """Check that a directory may be made under this name. Asked before the free space: a read-only disk may seem
    full.

    Raises:
        WriteError: it may not.
    """
    existing = nearest_existing(out.parent)
    if not existing.is_dir():
        raise WriteError(
            f"{out}: cannot be created, because {existing} is a file", hint="choose another --out"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        code = errno.EROFS if is_read_only else errno.EACCES
        raise write_error(out, OSError(code, os.strerror(code)))

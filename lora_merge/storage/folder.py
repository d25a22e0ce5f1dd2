"""A directory that a run writes to, known by its inode: nothing is written, removed or flushed anywhere else.

Where others may write, a name may lead elsewhere a moment later. So each use of a `Folder` opens it by its name,
checks that it is the same directory, and works from the descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from lora_merge.errors import WriteError
from lora_merge.storage import dirs
from lora_merge.storage.copying import copy_range, link
from lora_merge.storage.sources import open_source
from lora_merge.storage.writing import write_error, write_from

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator


@dataclass(frozen=True, slots=True)
class Folder:
    """One directory, identified by device and inode. Every method opens it by its path and checks that it is still
    the same.

    No other directory gets its inode while a descriptor of it is open: a run keeps those that it writes to open until
    its end.
    """

    path: Path
    """Where it was made; messages use this path."""

    device: int
    inode: int

    @classmethod
    def of(cls, path: Path, fd: int | None = None) -> Folder:
        """Return the directory that a path leads to now, or that a descriptor is open on.

        Raises:
            WriteError: it does not exist.
        """
        try:
            status = path.lstat() if fd is None else os.fstat(fd)
        except OSError as exc:
            raise write_error(path, exc) from exc
        return cls(path, status.st_dev, status.st_ino)

    def is_it(self, inode: tuple[int, int] | None) -> bool:
        """Return True when a (device, inode) pair is this directory's; None is not."""
        return inode == (self.device, self.inode)

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """Yield a descriptor of the directory, checked to be the same one.

        Raises:
            WriteError: its name is gone, or that of something else.
        """
        try:
            fd = dirs.open_directory(self.path)
        except OSError as exc:
            # A link or a file has the name now: O_NOFOLLOW and O_DIRECTORY refuse it.
            if exc.errno in {errno.ELOOP, errno.ENOTDIR}:
                raise self._replaced() from exc
            raise write_error(self.path, exc) from exc
        try:
            status = os.fstat(fd)
            if not self.is_it((status.st_dev, status.st_ino)):
                raise self._replaced()
            yield fd
        finally:
            os.close(fd)

    def _replaced(self) -> WriteError:
        return WriteError(
            f"{self.path}: another program replaced the directory of this run",
            hint="choose an --out where other users cannot write, and run again",
        )

    @contextlib.contextmanager
    def _parent(self, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """Yield a descriptor of the directory that a file is in, and the file's own name there. Every step is opened
        without following links.
        """
        *steps, leaf = PurePosixPath(name).parts
        with self.opened() as root, contextlib.ExitStack() as stack:
            fd = root
            try:
                for step in steps:
                    if make:
                        # Another worker may be making the same directory.
                        with contextlib.suppress(FileExistsError):
                            os.mkdir(step, 0o777, dir_fd=fd)
                    fd = dirs.open_directory(step, fd)
                    stack.callback(os.close, fd)
            except OSError as exc:
                raise write_error(self.path / name, exc) from exc
            yield fd, leaf

    @contextlib.contextmanager
    def writing(self, name: str, *, create: bool = False) -> Iterator[int]:
        """Yield a descriptor for positioned writes to a file in the directory.

        Args:
            name: relative, with slashes; directories of a new file are made.
            create: make it.

        Raises:
            WriteError: it cannot be opened, or it is a link, another's, or has a second name somewhere.
        """
        path = self.path / name
        # Readable too: files that are kept are recognised by their header.
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        with self._parent(name, make=create) as (parent, leaf):
            try:
                fd = dirs.open_regular(leaf, flags, parent)
                owner = os.fstat(parent).st_uid
            except OSError as exc:
                raise write_error(path, exc) from exc
        try:
            status = os.fstat(fd)
            # A file with a second name may be one of the base's (a hard link): writing would change that too.
            if status.st_nlink > 1 or status.st_uid != owner:
                raise WriteError(f"{path}: was not written by this run", hint="run again without --resume")
            yield fd
        finally:
            os.close(fd)

    def write_text(self, name: str, text: str) -> None:
        """Write a new small text file, in UTF-8.

        Half a character (a lone surrogate, as a path that is not UTF-8 has) is written as JSON escapes it.

        Raises:
            WriteError: the disk is full or cannot be written, or there is a file of this name.
        """
        with self.writing(name, create=True) as fd:
            write_from(fd, memoryview(text.encode("utf-8", "backslashreplace")), 0, self.path / name)

    def copy_in(self, source: str | Path, name: str) -> str:
        """Copy a file into a new file in the directory; return the digest of the bytes that were read.

        Raises:
            CheckpointError: the source cannot be read.
            WriteError: the target cannot be written.
        """
        with open_source(source) as old, self.writing(name, create=True) as fd:
            return copy_range(old, 0, old.nbytes, fd, 0, str(self.path / name))

    def link(self, source: Path, name: str, how: Literal["reflink", "hard"]) -> None:
        """Make a new file with an old file's bytes, without copying them (`lora_merge.storage.copying.link`).

        Raises:
            OSError: the filesystem, or the pair of them, cannot; the target does not exist then.
            WriteError: a directory cannot be made.
        """
        with self._parent(name, make=True) as (parent, leaf):
            link(source, leaf, how, dir_fd=parent)

    def read(self, name: str) -> bytes:
        """Return the bytes of a small file that a run wrote; empty where there is none, or it is not a regular file.

        Raises:
            WriteError: the directory is gone.
        """
        with self._parent(name) as (parent, leaf):
            try:
                fd = dirs.open_regular(leaf, os.O_RDONLY, parent)
            except OSError:
                return b""
        with os.fdopen(fd, "rb") as file, contextlib.suppress(OSError):
            return file.read()
        return b""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there. Of a link the link goes, not its target.

        Raises:
            WriteError: it cannot be removed.
        """
        with self._parent(name) as (parent, leaf):
            try:
                os.unlink(leaf, dir_fd=parent)
            except FileNotFoundError:
                pass
            except OSError as exc:
                raise write_error(self.path / name, exc) from exc

    def rename(self, old: str, new: str) -> None:
        """Rename a file within the directory; a file that has the new name is replaced.

        Raises:
            WriteError: it cannot be renamed.
        """
        with self.opened() as fd:
            try:
                os.rename(old, new, src_dir_fd=fd, dst_dir_fd=fd)
            except OSError as exc:
                raise write_error(self.path / new, exc) from exc

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove everything in the directory, except some files.

        Raises:
            WriteError: something cannot be removed.
        """
        with self.opened() as fd:
            try:
                dirs.clear(fd, keep)
            except OSError as exc:
                raise write_error(self.path, exc) from exc

    def listing(self) -> dirs.Listing:
        """Return every file below the directory as it is now (`dirs.Listing`).

        Raises:
            WriteError: the directory is gone.
        """
        with self.opened() as fd:
            try:
                return dirs.listing(fd)
            except OSError as exc:
                raise write_error(self.path, exc) from exc

    def flush(self) -> None:
        """Make every file and directory below durable, and the directory itself.

        Raises:
            WriteError: the disk refused something, the directory is gone, or an entry is not a regular file.
        """
        with self.opened() as root:
            try:
                for fd, within, names in dirs.walk(root):
                    for name in names:
                        self._flush_file(fd, within, name)
                    dirs.sync(fd)
            except OSError as exc:
                raise write_error(self.path, exc) from exc

    def flush_file(self, name: str) -> None:
        """Make one file durable, if it is there.

        Raises:
            WriteError: the disk refused it, the directory is gone, or it is not a regular file.
        """
        with self._parent(name) as (parent, leaf):
            try:
                self._flush_file(parent, "", leaf)
            except OSError as exc:
                raise write_error(self.path, exc) from exc

    def _flush_file(self, dir_fd: int, within: str, name: str) -> None:
        try:
            fd = dirs.open_regular(name, os.O_RDONLY, dir_fd)
        except FileNotFoundError:  # its writer gave it another name meanwhile
            return
        except OSError as exc:
            if exc.errno not in {errno.ELOOP, errno.EINVAL, errno.ENXIO}:
                raise
            sentence = f"{self.path / within / name}: was not written by this run"
            raise WriteError(sentence, hint="choose an --out where other users cannot write") from exc
        try:
            dirs.sync(fd)
        finally:
            os.close(fd)

    def narrow(self, allowed: int) -> None:
        """Take permissions away from every file and directory below, and from the directory itself.

        A file with a second name is the base's own and stays as it is. A filesystem that keeps no modes is left alone.

        Args:
            allowed: the bits that may stay.

        Raises:
            WriteError: the directory is gone.
        """
        with self.opened() as root:
            try:
                for fd, _, names in dirs.walk(root):
                    for name in names:
                        _narrow_file(name, fd, allowed)
                    with contextlib.suppress(OSError):
                        dirs.narrow(fd, allowed)
            except OSError as exc:
                raise write_error(self.path, exc) from exc


def _narrow_file(name: str, dir_fd: int, allowed: int) -> None:
    with contextlib.suppress(OSError):
        file = dirs.open_regular(name, os.O_RDONLY, dir_fd)
        try:
            dirs.narrow(file, allowed)
        finally:
            os.close(file)

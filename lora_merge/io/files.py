"""Files as such: descriptors, positioned transfers, JSON, small copies, digests.

Every transfer loops: one system call moves at most 0x7ffff000 bytes, and reads short without an error.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import struct
import sys
from typing import TYPE_CHECKING, Any, Literal

from lora_merge.core.identity import FileIdentity
from lora_merge.core.json_values import OddValueError, check_values, shown
from lora_merge.errors import CheckpointError, OutOfMemoryError, ResolveError, WriteError
from lora_merge.io import input_files
from lora_merge.io.instead import instead_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import torch
    import xxhash

MAX_TRANSFER_BYTES = 1 << 30
"""Asked of one system call; below the kernel's limit of 0x7ffff000."""

MAX_JSON_BYTES = 100_000_000
"""Of a JSON file that is read: as much as a safetensors header may have. The index of 100 000 tensors has 10 MB."""

_MAX_JSON_VALUES = 16_000_000
"""Of a JSON text. Each takes some 60 bytes of memory, where ``[],`` takes three of the text; a header has ten for a tensor."""

_SHOWN_CHARACTERS = 200
"""Of a key in a message."""

BLOCK_BYTES = 1 << 22
"""Read at once, where a whole file or tensor passes by."""

_AHEAD_BYTES = 32 << 20
"""Asked of the disk in advance."""

_BLOCKS: list[memoryview] = []
"""Blocks that nobody has borrowed."""

_FICLONE, _FICLONERANGE = 0x40049409, 0x4020940D
"""The requests of Linux's ``ioctl_ficlone(2)`` and ``ioctl_ficlonerange(2)``."""

_PAGE_BYTES = 4096
"""Of the page cache, and a multiple of the blocks of any filesystem that shares them."""

_RWF_DONTCACHE = 0x80
"""The flag of Linux's ``pwritev2(2)``."""

_UNABLE = {errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
"""What a filesystem, a kernel or a sandbox answers that does not know a call, or does not permit it."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
"""What a disk without room answers, or one of which a user has no more."""

_CLOEXEC, _NONBLOCK = getattr(os, "O_CLOEXEC", 0), getattr(os, "O_NONBLOCK", 0)


def user_path(text: str) -> Path:
    """Return the path that a text means: ``~`` and ``~name`` are home directories.

    Raises:
        ResolveError: nobody has that name, or it holds what no path has: a NUL character, or half of one.
    """
    from pathlib import Path

    if "\0" in text:
        raise ResolveError(f"{text!r}: holds a NUL character, which no path has", hint="write it anew")
    try:
        os.fsencode(text)
        return Path(text).expanduser()
    except UnicodeEncodeError as exc:
        sentence = f"{shown(text)}: holds half of a character, which no path has"
        raise ResolveError(sentence, hint="write it again") from exc
    except RuntimeError as exc:
        name = text.partition("/")[0]
        raise ResolveError(
            f"{text}: there is no user {name.removeprefix('~') or 'with a home directory'}",
            hint=f"write ./{name} for a directory of that name",
        ) from exc


def output_path(text: str) -> Path:
    """Return the one absolute path of a directory that is to be, however it is written; a link of its own name stays one.

    Raises:
        ResolveError: it is no path, or has a variable in it that no shell filled in.
    """
    if re.search(r"\$\w|\$\{", text):
        hint = "variables are not filled in here: write the path out"
        raise ResolveError(f"{text}: has a variable of the shell in it, expected a path", hint=hint)
    path = user_path(text)
    return real_path(path.parent) / path.name if path.name not in {"", ".."} else real_path(path)


def real_path(path: Path) -> Path:
    """Return the one absolute path of a place, links followed as far as they lead.

    Raises:
        ResolveError: they lead in a circle, or the current directory was removed.
    """
    try:
        return path.resolve()
    except FileNotFoundError as exc:
        sentence = f"{path}: the current directory was removed, and this path begins there"
        raise ResolveError(sentence, hint="cd to another directory, or write the whole path") from exc
    except (OSError, RuntimeError) as exc:  # RuntimeError: a circle, up to Python 3.12
        why = exc.strerror if isinstance(exc, OSError) else "its links lead in a circle"
        raise ResolveError(f"{path}: cannot be followed ({why})") from exc


def is_directory(path: Path) -> bool:
    """Return True for a directory; False where there is none, and where nobody may look."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_file(path: Path) -> bool:
    """Return True for a file; False where there is none, nobody may look, or no file can have such a name."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_there(path: Path) -> bool:
    """Return True where something has this name, as far as may be seen."""
    try:
        return path.exists()
    except OSError:
        return False


def nearest_existing(path: Path) -> Path:
    """Return a path, or the nearest of the directories it is to be in that exists, as far as may be seen."""
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            if place.exists():
                return place
    return path


@contextlib.contextmanager
def open_for_reading(path: str | Path) -> Iterator[int]:
    """Yield a descriptor for positioned reads. Every file of a stranger is opened here.

    A pipe, a device or a socket would block, or never end: they are refused, and opening one waits for nobody.

    Raises:
        CheckpointError: the file is missing, cannot be opened, or is no regular file.
        ChangedError: the run has read another file of this name (`input_files.watching`).
    """
    try:
        fd = os.open(path, os.O_RDONLY | _CLOEXEC | _NONBLOCK)
    except (
        OSError,
        ValueError,
    ) as exc:  # ValueError: a NUL character, or a name that the system cannot encode
        why = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise CheckpointError(str(path), "", f"cannot be opened ({why})") from exc
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise CheckpointError(str(path), "", f"is {_kind_of(mode)}", "a regular file")
        input_files.tell_opened(path, fd, identity_of(fd))
        yield fd
    finally:
        os.close(fd)


def why_no_file(path: Path) -> str:
    """Return why a path is no regular file, as the end of a sentence; empty for one that is. Nothing is opened."""
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        return f"cannot be opened ({exc.strerror})"
    return "" if stat.S_ISREG(mode) else f"is {_kind_of(mode)}, expected a regular file"


def _kind_of(mode: int) -> str:
    """Return what an inode is, in words, by its mode."""
    kinds = {
        stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "a special file")


def identity_of(fd: int) -> FileIdentity:
    """Return which file a descriptor is of, as it is now."""
    status = os.fstat(fd)
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def read_bytes(path: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """Return the bytes of a small file.

    Raises:
        CheckpointError: it cannot be read, is no regular file, or is longer than `most` bytes.
    """
    with open_for_reading(path) as fd:
        nbytes = os.fstat(fd).st_size
        if nbytes > most:
            raise CheckpointError(str(path), "", f"has {nbytes} bytes", f"{most} at most")
        parts, n_read = [], 0
        try:
            while part := os.read(fd, min(BLOCK_BYTES, most + 1 - n_read)):
                parts.append(part)
                n_read += len(part)
        except OSError as exc:
            raise CheckpointError(str(path), "", f"cannot be read ({exc.strerror})") from exc
    if n_read > most:  # it grew, or says that it has no bytes, as files of /proc do
        raise CheckpointError(str(path), "", f"has more than {most} bytes", f"{most} at most")
    content = b"".join(parts)
    input_files.tell_read(path, 0, content)
    return content


@contextlib.contextmanager
def borrowed_block() -> Iterator[memoryview]:
    """Yield a block of memory, `BLOCK_BYTES` long, that comes back at the end: the kernel need not find a new one."""
    try:
        block = _BLOCKS.pop()
    except IndexError:
        block = memoryview(bytearray(BLOCK_BYTES))
    try:
        yield block
    finally:
        _BLOCKS.append(block)


def read_into(fd: int, buffer: memoryview, offset: int, label: str | Path) -> None:
    """Fill a buffer from an offset of a file.

    Raises:
        CheckpointError: the file ends too soon, or the disk cannot be read.
        ChangedError: the run has read other bytes there (`input_files.watching`).
    """
    read_unwatched(fd, buffer, offset, label)
    input_files.tell_read(label, offset, buffer)


def read_unwatched(fd: int, buffer: memoryview, offset: int, label: str | Path) -> None:
    """Fill a buffer from an offset of a file; for what has a digest of its own.

    Raises:
        CheckpointError: the file ends too soon, or the disk cannot be read.
    """
    done = 0
    while done < len(buffer):
        try:
            n_read = _read(fd, buffer[done : done + MAX_TRANSFER_BYTES], offset + done)
        except OverflowError:  # no file is as long as that
            n_read = 0
        except OSError as exc:
            raise CheckpointError(str(label), "", f"cannot be read ({exc.strerror})") from exc
        if n_read == 0:
            raise CheckpointError(
                str(label), "", f"ends at byte {offset + done}", f"{offset + len(buffer)} or more",
                hint="it changed while it was read; run again when nothing else writes to it",
            )  # fmt: skip
        done += n_read


def _read(fd: int, buffer: memoryview, offset: int) -> int:
    """Read into a buffer with one call; return how many bytes.

    Python asks for ``preadv2``, which some filesystems and sandboxes refuse; ``pread`` is the call that all know.
    """
    try:
        return os.preadv(fd, [buffer], offset)
    except OSError as exc:
        if exc.errno not in _UNABLE:
            raise
    data = os.pread(fd, min(len(buffer), BLOCK_BYTES), offset)
    buffer[: len(data)] = data
    return len(data)


class ReadAhead:
    """Has the disk fetch what of a range will be read next, while what was fetched before is worked on.

    Args:
        fd: of the file.
        start: of the range, in bytes; end: the byte after it.
        is_watched: False where the caller takes a digest of what is read.
    """

    def __init__(self, fd: int, start: int, end: int, *, is_watched: bool = True) -> None:
        self._fd, self._asked, self._end = fd, start, end
        self._read = read_into if is_watched else read_unwatched

    def read_into(self, buffer: memoryview, offset: int, label: str | Path) -> None:
        """Fill a buffer from an offset of the file; what lies before it is not fetched.

        Raises:
            CheckpointError: the file ends too soon, or the disk cannot be read.
        """
        self._asked = max(self._asked, offset)
        if self._asked < min(offset + len(buffer) + _AHEAD_BYTES // 2, self._end):
            count = min(_AHEAD_BYTES, self._end - self._asked)
            if hasattr(os, "posix_fadvise"):
                with contextlib.suppress(OSError):  # it is a wish
                    os.posix_fadvise(self._fd, self._asked, count, os.POSIX_FADV_WILLNEED)
            self._asked += count
        self._read(self._fd, buffer, offset, label)


def read_blocks(fd: int, start: int, nbytes: int, label: str | Path) -> Iterator[memoryview]:
    """Yield the bytes of a range in order, block by block, through one reused buffer.

    Raises:
        CheckpointError: the file ends too soon, or the disk cannot be read.
    """
    ahead = ReadAhead(fd, start, start + nbytes)
    with borrowed_block() as block:
        for at in range(0, nbytes, BLOCK_BYTES):
            part = block[: min(BLOCK_BYTES, nbytes - at)]
            ahead.read_into(part, start + at, label)
            yield part


def write_from(fd: int, buffer: memoryview, offset: int, label: str | Path) -> None:
    """Write a buffer to an offset of a file.

    Raises:
        WriteError: the disk is full or cannot be written.
    """
    _write_all(fd, [buffer], offset, label)


def _write_all(
    fd: int, buffers: list[memoryview], offset: int, label: str | Path, *, uncached: bool = False
) -> None:
    """Write buffers one after the other; past the page cache, if that is wanted and the kernel can."""
    ways: list[Callable[[int, list[memoryview], int], int]] = [os.pwritev, _pwrite]
    if uncached and sys.platform == "linux":
        ways.insert(0, _write_uncached)
    while buffers:
        try:
            n_written = ways[0](fd, buffers, offset)
        except OSError as exc:
            if len(ways) == 1 or exc.errno not in _UNABLE:
                raise write_error(label, exc) from exc
            del ways[0]
            continue
        offset += n_written
        while buffers and n_written >= len(buffers[0]):
            n_written -= len(buffers.pop(0))
        if buffers:
            buffers[0] = buffers[0][n_written:]


def _write_uncached(fd: int, buffers: list[memoryview], offset: int) -> int:
    return os.pwritev(fd, buffers, offset, _RWF_DONTCACHE)


def _pwrite(fd: int, buffers: list[memoryview], offset: int) -> int:
    """Write the first buffer. Python asks for ``pwritev2`` where it has several, and some sandboxes refuse that call."""
    return os.pwrite(fd, buffers[0], offset)


class Stream:
    """Writes a range of a file from its beginning to its end, past the page cache where the kernel can.

    What is written goes to the disk at once, and its pages are free for what comes next: the page cache stays as it is,
    and no new memory has to be found for every page (Linux 6.14 and later, on ext4, XFS and btrfs; elsewhere it is
    written as usual). Only whole pages are sent, but at the ends, since half a page would have to be read again.

    Args:
        fd: of the file.
        start: of the range, in bytes.
        label: what to call the file in messages.
    """

    def __init__(self, fd: int, start: int, label: str | Path) -> None:
        self._fd, self._label = fd, label
        self._offset = start
        self._held = bytearray()

    def write(self, buffer: memoryview) -> None:
        """Write the next bytes, up to the last whole page.

        Raises:
            WriteError: the disk is full or cannot be written.
        """
        end = self._offset + len(self._held) + len(buffer)
        n_whole = end - end % _PAGE_BYTES - self._offset - len(self._held)
        if n_whole <= 0:
            self._held += buffer
            return
        held = [memoryview(self._held)] if self._held else []
        _write_all(self._fd, [*held, buffer[:n_whole]], self._offset, self._label, uncached=True)
        self._offset += len(self._held) + n_whole
        self._held = bytearray(buffer[n_whole:])

    def finish(self) -> None:
        """Write what was held back.

        Raises:
            WriteError: the disk is full or cannot be written.
        """
        if self._held:
            write_from(self._fd, memoryview(self._held), self._offset, self._label)
            self._offset, self._held = self._offset + len(self._held), bytearray()


def copy_range(
    source_fd: int, start: int, nbytes: int, target_fd: int, target_start: int, labels: tuple[str, str]
) -> None:
    """Copy bytes from one file to another, in the kernel where the platform can.

    Where the filesystem shares blocks between files, nothing is moved.

    Args:
        labels: what to call source and target in messages.

    Raises:
        CheckpointError: the source ends too soon.
        WriteError: the disk is full or cannot be written.
    """
    first, last = _share_blocks(source_fd, start, nbytes, target_fd, target_start)
    for begin, end in ((0, first), (last, nbytes)):
        at = begin + _copy_in_kernel(source_fd, start + begin, end - begin, target_fd, target_start + begin)
        for block in read_blocks(source_fd, start + at, end - at, labels[0]):
            write_from(target_fd, block, target_start + at, labels[1])
            at += len(block)


def _share_blocks(
    source_fd: int, start: int, nbytes: int, target_fd: int, target_start: int
) -> tuple[int, int]:
    """Let two files share the whole blocks of a range; return which part of the range that is, from its start.

    It takes a filesystem that can (XFS, btrfs), and a range that lies in both files alike.
    """
    first = -start % _PAGE_BYTES
    last = (start + nbytes) // _PAGE_BYTES * _PAGE_BYTES - start
    if (start - target_start) % _PAGE_BYTES or first >= last or sys.platform != "linux":
        return 0, 0
    import fcntl

    wanted = struct.pack("=qQQQ", source_fd, start + first, last - first, target_start + first)
    try:
        fcntl.ioctl(target_fd, _FICLONERANGE, wanted)
    except OSError:
        return 0, 0
    return first, last


def _copy_in_kernel(source_fd: int, start: int, nbytes: int, target_fd: int, target_start: int) -> int:
    """Return how many bytes the kernel copied; it may refuse (two filesystems, another platform)."""
    done = 0
    while hasattr(os, "copy_file_range") and done < nbytes:
        count = min(MAX_TRANSFER_BYTES, nbytes - done)
        try:
            n_copied = os.copy_file_range(source_fd, target_fd, count, start + done, target_start + done)
        except OSError:  # not here, not permitted, or a fault: reading and writing by hand tells which
            break
        if n_copied == 0:
            break
        done += n_copied
    return done


def link(source: Path, target: str, how: Literal["reflink", "hard"], *, dir_fd: int) -> None:
    """Make a new file of an old one's bytes without moving them.

    Args:
        source: path of the old file.
        target: name of the new one.
        how: ``reflink``: the two share blocks until one changes; ``hard``: they are one file with two names.
        dir_fd: of the directory that the new one is in.

    Raises:
        OSError: the filesystem, or the pair of them, cannot; there is no target then.
        CheckpointError: the old one cannot be opened, or another has taken its name.
    """
    with open_for_reading(source) as old:
        if how == "hard":
            os.link(source.resolve(), target, dst_dir_fd=dir_fd)
            if not os.path.samestat(os.fstat(old), os.stat(target, dir_fd=dir_fd, follow_symlinks=False)):
                os.unlink(target, dir_fd=dir_fd)
                raise input_files.changed(str(source))
            return
        if sys.platform != "linux":
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        import fcntl

        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | _CLOEXEC
        new = os.open(target, flags, 0o666, dir_fd=dir_fd)
        try:
            fcntl.ioctl(new, _FICLONE, old)
        except OSError:
            os.unlink(target, dir_fd=dir_fd)
            raise
        finally:
            os.close(new)


def allocate(fd: int, nbytes: int) -> None:
    """Give a file its size, and its blocks where the filesystem can promise them.

    Raises:
        OSError: the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as exc:
            if exc.errno in _FULL:
                raise
        else:
            return
    try:
        os.ftruncate(fd, nbytes)
    except PermissionError:  # a filesystem that makes no file longer but by writing to it
        os.pwrite(fd, b"\0", nbytes - 1)


def read_json(path: Path) -> dict[str, Any]:
    """Return the table in a JSON file.

    Raises:
        CheckpointError: it is missing, too long to be meant, no JSON, names a key twice, holds no table, or a value that
            no field can hold.
    """
    text = read_bytes(path)
    try:
        value = parse_json(text, paths=True)
    except OddValueError as exc:
        raise CheckpointError(str(path), exc.subject, exc.got, exc.wanted) from exc
    except (ValueError, RecursionError) as exc:
        raise _no_json(path, exc) from exc
    if not isinstance(value, dict):
        raise CheckpointError(str(path), "", f"holds a JSON {type(value).__name__}", "a table")
    return value


def _no_json(path: Path, exc: Exception) -> CheckpointError:
    """Return the error of a file that is no JSON: what it is instead, or where it breaks off."""
    what = instead_of(path)
    if what is not None:
        return CheckpointError(str(path), "", what.sentence, hint=what.hint)
    is_cut = isinstance(exc, json.JSONDecodeError) and exc.pos >= len(exc.doc.rstrip())
    hint = "the file breaks off: download it again, or save it again" if is_cut else ""
    return CheckpointError(str(path), "", f"is not valid JSON ({exc})", hint=hint)


def read_text(path: Path) -> str:
    """Return the text of a small file; bytes that are no UTF-8 are replaced.

    Raises:
        CheckpointError: it cannot be read, or is too long to be meant.
    """
    text = read_bytes(path).decode("utf-8", errors="replace")
    return text.replace("\r\n", "\n")


def parse_json(text: bytes, *, paths: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        text: of a file.
        paths: whether names of files that are not UTF-8 may be in it, as `write_text` writes them.

    Raises:
        ValueError: it is no JSON or no UTF-8, has too many values to be meant, a table names a key twice, or a value is one
            that no field can hold (`OddValueError`).
        RecursionError: it is nested too deeply.
    """
    n_values = sum(map(text.count, (b",", b"[", b"{")))
    if n_values > _MAX_JSON_VALUES:
        raise ValueError(f"some {n_values} values, expected {_MAX_JSON_VALUES} at most")
    value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    check_values(text, value, paths=paths)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:_SHOWN_CHARACTERS]!r} stands twice")
            seen.add(key)
    return table


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, in the order of its elements."""
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def write_text(path: Path, text: str) -> None:
    """Write a new small text file, in UTF-8.

    A path of the user's need not be UTF-8: the bytes of it that are not become ``\\udcff`` here, which JSON reads as
    the same path again.

    Raises:
        WriteError: the disk is full or cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as exc:
        raise write_error(path, exc) from exc


def same_bytes(one: Path, other: Path) -> bool:
    """Return True when two files hold the same bytes.

    Both are read: `filecmp` keeps its answers by size and time, which a changed file may share with the old one.

    Raises:
        CheckpointError: one cannot be read.
    """
    with open_for_reading(one) as here, open_for_reading(other) as there:
        nbytes = os.fstat(here).st_size
        if os.fstat(there).st_size != nbytes:
            return False
        pairs = zip(read_blocks(here, 0, nbytes, one), read_blocks(there, 0, nbytes, other), strict=True)
        return all(mine.tobytes() == theirs.tobytes() for mine, theirs in pairs)


def new_digest() -> xxhash.xxh3_128:
    """Return an empty digest.

    XXH3 with 128 bits finds every accident at the speed of memory, a few per cent of a copy. It is no
    defence against someone who forges files on purpose.
    """
    import xxhash

    return xxhash.xxh3_128()


def digest_text(digest: xxhash.xxh3_128) -> str:
    """Return a digest as it stands in records and manifests."""
    return f"xxh3_128:{digest.hexdigest()}"


def files_digest(paths: Sequence[Path]) -> str:
    """Return the digest of one whole file, or of the digests of several.

    Raises:
        CheckpointError: one cannot be read.
    """
    texts = [file_digest(path) for path in paths]
    if len(texts) == 1:
        return texts[0]
    digest = new_digest()
    digest.update("\n".join(texts).encode())
    return digest_text(digest)


def file_digest(path: Path, most: int | None = None) -> str:
    """Return the digest of a whole file.

    Raises:
        CheckpointError: it cannot be read, or is longer than `most` bytes: one of holes takes no room, and hours to read.
    """
    digest = new_digest()
    with open_for_reading(path) as fd:
        nbytes = os.fstat(fd).st_size
        if most is not None and nbytes > most:
            raise CheckpointError(str(path), "", f"has {nbytes} bytes", f"{most} at most")
        for block in read_blocks(fd, 0, nbytes, path):
            digest.update(block)
    return digest_text(digest)


def range_digest(
    fd: int, start: int, nbytes: int, label: str | Path, *, cached_only: bool = False
) -> str | None:
    """Return the digest of some bytes of a file.

    Args:
        cached_only: read what is in memory; None where that is not all of it, or the kernel cannot tell.

    Raises:
        CheckpointError: the file ends too soon, or the disk cannot be read.
    """
    digest = new_digest()
    if not cached_only:
        for block in read_blocks(fd, start, nbytes, label):
            digest.update(block)
        return digest_text(digest)
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    with borrowed_block() as block:
        done = 0
        while done < nbytes:
            part = block[: min(BLOCK_BYTES, nbytes - done)]
            try:
                n_read = os.preadv(fd, [part], start + done, os.RWF_NOWAIT)
            except OSError:
                return None
            if n_read == 0:
                return None
            digest.update(part[:n_read])
            done += n_read
    return digest_text(digest)


def text_digest(text: str) -> str:
    """Return the digest of a text as it is written (`io.folder.Folder.write_text`)."""
    digest = new_digest()
    digest.update(text.encode("utf-8", "backslashreplace"))
    return digest_text(digest)


def modified_at(path: Path) -> int:
    """Return when a file was written to last, in nanoseconds, or what a program says of that.

    Raises:
        CheckpointError: there is no such file.
    """
    try:
        return path.stat().st_mtime_ns
    except OSError as exc:
        raise CheckpointError(str(path), "", f"cannot be read ({exc.strerror})") from exc


def write_error(label: str | Path, exc: OSError) -> WriteError:
    """Return the error for a failed write, with the way out."""
    if exc.errno == errno.ENOMEM:
        return OutOfMemoryError(f"writing {label}")
    if exc.errno in _FULL:
        return WriteError(f"{label}: no space left on the disk", hint="free some, or choose another --out")
    hint = ""
    if exc.errno == errno.EROFS:
        hint = "choose an --out on a disk that can be written"
    elif exc.errno in {errno.EACCES, errno.EPERM}:
        hint = "choose an --out where you may write"
    elif exc.errno == errno.ENAMETOOLONG:
        hint = "choose a shorter --out"
    return WriteError(f"{label}: cannot be written ({exc.strerror or exc})", hint=hint)

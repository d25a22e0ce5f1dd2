"""Cheap signs that a large file has changed: times, holes, some of its pages."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.errors import CheckpointError
from lora_merge.storage.digests import digest_text, new_digest
from lora_merge.storage.objects.urls import path_here
from lora_merge.storage.reading import read_into
from lora_merge.storage.sources import open_source, version_at

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lora_merge.core.identity import FileIdentity
    from lora_merge.core.tensor import TensorRef

PAGE_BYTES = 4096

_MOST_PAGES = 4096
"""The most pages of one checkpoint that are read: about a second for a disk that has none of them in memory."""


def changed_at(path: str | Path) -> int:
    """Return the time of the last possible change of a file, in nanoseconds.

    It is the later of mtime and ctime. Programs that copy set mtime back; the kernel sets ctime, also when a file is
    renamed, linked or given another mode. An mtime in the future tells nothing. For a storage without times it is
    now.

    Raises:
        CheckpointError: the file does not exist.
    """
    version = _version(path)
    if version.tag:
        return time.time_ns()
    # A time in the future: a clock was wrong, or a program set it.
    is_to_come = version.modified > time.time_ns()
    return version.changed if is_to_come else max(version.modified, version.changed)


def modified_at(path: str | Path) -> int:
    """Return the mtime of a file in nanoseconds, which programs may set; now for a storage without times.

    Raises:
        CheckpointError: the file does not exist.
    """
    version = _version(path)
    return time.time_ns() if version.tag else version.modified


def newer_here(texts: Iterable[str], than: int) -> list[str]:
    """Return the files of this machine that were modified after a time, sorted; those in stores are left out.

    Args:
        texts: paths and URLs of files.
        than: the time, in nanoseconds since 1970.

    Raises:
        CheckpointError: one does not exist.
    """
    places = ((text, path_here(text)) for text in sorted(set(texts)))
    return [text for text, here in places if here is not None and modified_at(here) > than]


def _version(path: str | Path) -> FileIdentity:
    """Return the version of a file.

    Raises:
        CheckpointError: the file does not exist.
    """
    try:
        return version_at(str(path))
    except OSError as exc:
        raise CheckpointError(str(path), "", f"cannot be read ({exc.strerror})") from exc


def has_hole(path: Path) -> bool:
    """Return True when a part of a file was never written, as after a crash; False where the filesystem cannot say.

    Raises:
        CheckpointError: the file cannot be opened.
    """
    with open_source(path) as source:
        if source.fd is None:
            return False
        try:
            return os.lseek(source.fd, 0, os.SEEK_HOLE) < source.nbytes
        except (OSError, AttributeError):  # nobody here knows
            return False


def sampled(refs: Sequence[TensorRef]) -> list[TensorRef]:
    """Return the tensors whose pages are read: all, or every second or third of very many, and the last one of
    each file.
    """
    # Two pages of each tensor are read.
    step = -(-2 * len(refs) // _MOST_PAGES) or 1
    last = {ref.file: ref for ref in refs}
    chosen = [*refs[::step], *(last.values() if step > 1 else ())]
    return list(dict.fromkeys(chosen))


def pages(ref: TensorRef) -> Iterator[bytes]:
    """Yield the first and the last 4096 bytes of a tensor; once, where that is the same.

    Raises:
        CheckpointError: the file cannot be read.
    """
    with open_source(ref.file) as source:
        for start in dict.fromkeys((ref.start, max(ref.start, ref.end - PAGE_BYTES))):
            page = bytearray(min(PAGE_BYTES, ref.nbytes))
            read_into(source, memoryview(page), start)
            yield bytes(page)


def sample_digest(refs: Sequence[TensorRef]) -> str:
    """Return a digest of names, dtypes and shapes of tensors, and of some of their bytes.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = new_digest()
    for ref in refs:
        digest.update(repr((ref.name, ref.dtype, ref.shape)).encode("utf-8", "surrogatepass"))
    for ref in sampled(refs):
        for page in pages(ref):
            digest.update(page)
    return digest_text(digest)

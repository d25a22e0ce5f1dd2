"""Signs that a large file may not be what it was, which cost next to nothing to look for: times, holes, some of its pages."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.errors import CheckpointError
from lora_merge.storage.digests import digest_text, new_digest
from lora_merge.storage.reading import read_into
from lora_merge.storage.sources import open_source, version_at

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_merge.core.identity import FileIdentity
    from lora_merge.core.tensor import TensorRef

PAGE_BYTES = 4096

_MOST_PAGES = 4096
"""Of one checkpoint that are looked at: a second's work for a disk that has none of them at hand."""


def changed_at(path: str | Path) -> int:
    """Return when a file may have changed last, in nanoseconds.

    That is the later of two times. Programs that copy set the time of modification back; the kernel sets the other one
    itself, also when a file is renamed, linked or given another mode. A time to come tells nothing. Of a storage without times
    it is now: nobody says that it was earlier.

    Raises:
        CheckpointError: there is no such file.
    """
    version = _version(path)
    if version.tag:
        return time.time_ns()
    is_to_come = version.modified > time.time_ns()
    return version.changed if is_to_come else max(version.modified, version.changed)


def modified_at(path: str | Path) -> int:
    """Return when a file was written to last, in nanoseconds, or what a program says of that; now where there are no times.

    Raises:
        CheckpointError: there is no such file.
    """
    version = _version(path)
    return time.time_ns() if version.tag else version.modified


def _version(path: str | Path) -> FileIdentity:
    """Return which file has a name.

    Raises:
        CheckpointError: there is no such file.
    """
    try:
        return version_at(str(path))
    except OSError as exc:
        raise CheckpointError(str(path), "", f"cannot be read ({exc.strerror})") from exc


def has_hole(path: Path) -> bool:
    """Return True where the filesystem knows of a part of a file that was never written, as after a crash.

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
    """Return those of some tensors of a checkpoint whose pages are looked at: all, or of very many every second, or third."""
    step = -(-2 * len(refs) // _MOST_PAGES) or 1
    last = {ref.file: ref for ref in refs}
    chosen = [*refs[::step], *(last.values() if step > 1 else ())]
    return list(dict.fromkeys(chosen))


def pages(ref: TensorRef) -> Iterator[bytes]:
    """Yield the first and the last bytes of a tensor, a page of each.

    Raises:
        CheckpointError: the file cannot be read.
    """
    with open_source(ref.file) as source:
        for start in dict.fromkeys((ref.start, max(ref.start, ref.end - PAGE_BYTES))):
            page = bytearray(min(PAGE_BYTES, ref.nbytes))
            read_into(source, memoryview(page), start)
            yield bytes(page)


def sample_digest(refs: Sequence[TensorRef]) -> str:
    """Return a digest of where some tensors lie, of their shapes, and of some of their bytes.

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

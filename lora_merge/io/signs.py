"""Signs that a large file may not be what it was, which cost next to nothing to look for: times, holes, some of its pages."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.errors import CheckpointError
from lora_merge.storage.digests import digest_text, new_digest
from lora_merge.storage.local import open_for_reading
from lora_merge.storage.reading import read_into

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_merge.core.tensor import TensorRef

PAGE_BYTES = 4096

_MOST_PAGES = 4096
"""Of one checkpoint that are looked at: a second's work for a disk that has none of them at hand."""


def changed_at(path: str | Path) -> int:
    """Return when a file may have changed last, in nanoseconds.

    That is the later of two times. Programs that copy set the time of modification back; the kernel sets the other one
    itself, also when a file is renamed, linked or given another mode. A time to come tells nothing.

    Raises:
        CheckpointError: there is no such file.
    """
    try:
        status = Path(path).stat()
    except OSError as exc:
        raise CheckpointError(str(path), "", f"cannot be read ({exc.strerror})") from exc
    modified = status.st_mtime_ns
    return status.st_ctime_ns if modified > time.time_ns() else max(modified, status.st_ctime_ns)


def has_hole(path: Path) -> bool:
    """Return True where the filesystem knows of a part of a file that was never written, as after a crash.

    Raises:
        CheckpointError: the file cannot be opened.
    """
    with open_for_reading(path) as fd:
        try:
            return os.lseek(fd, 0, os.SEEK_HOLE) < os.fstat(fd).st_size
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
    with open_for_reading(ref.file) as fd:
        for start in dict.fromkeys((ref.start, max(ref.start, ref.end - PAGE_BYTES))):
            page = bytearray(min(PAGE_BYTES, ref.nbytes))
            read_into(fd, memoryview(page), start, ref.file)
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

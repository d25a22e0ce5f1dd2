"""Digests of files, of ranges and of texts; comparing two files byte by byte."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lora_merge.errors import CheckpointError
from lora_merge.storage.reading import BLOCK_BYTES, borrowed_block, read_blocks
from lora_merge.storage.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import xxhash

    from lora_merge.storage.sources import Source


def same_bytes(one: str | Path, other: str | Path) -> bool:
    """Return True when two files hold the same bytes. Both are read.

    Raises:
        CheckpointError: one cannot be read.
    """
    # `filecmp` keeps its answers by size and time, which a changed file may share with the old one.
    with open_source(one) as here, open_source(other) as there:
        if here.nbytes != there.nbytes:
            return False
        pairs = zip(read_blocks(here, 0, here.nbytes), read_blocks(there, 0, here.nbytes), strict=True)
        return all(mine.tobytes() == theirs.tobytes() for mine, theirs in pairs)


def new_digest() -> xxhash.xxh3_128:
    """Return an empty XXH3 digest of 128 bits.

    It finds every accident, at the speed of memory: a few per cent of the time of a copy. It is not a defence against
    files that are forged on purpose.
    """
    import xxhash

    return xxhash.xxh3_128()


def digest_text(digest: xxhash.xxh3_128) -> str:
    """Return a digest as records and manifests have it: ``xxh3_128:`` and 32 hexadecimal digits."""
    return f"xxh3_128:{digest.hexdigest()}"


OF_FILE = "crc64nvme:"
"""How a digest begins that a store has stated of a whole file, where it copied a tensor by itself, so that the tensor was not read."""


def checksum_text(crc: int) -> str:
    """Return such a checksum as records have it.

    Example:
        >>> checksum_text(255)
        'crc64nvme:00000000000000ff'
    """
    return f"{OF_FILE}{crc:016x}"


def is_of_file(digest: str) -> bool:
    """Return True for a digest in the record of a tensor that is the checksum of its whole file."""
    return digest.startswith(OF_FILE)


def files_digest(paths: Sequence[str | Path]) -> str:
    """Return the digest of one whole file; of several, the digest of their digests, in the order given.

    Raises:
        CheckpointError: one cannot be read.
    """
    texts = [file_digest(path) for path in paths]
    if len(texts) == 1:
        return texts[0]
    digest = new_digest()
    digest.update("\n".join(texts).encode())
    return digest_text(digest)


def file_digest(path: str | Path, most: int | None = None) -> str:
    """Return the digest of a whole file.

    Raises:
        CheckpointError: it cannot be read, or is longer than ``most`` bytes. A sparse file takes no room on the disk
            and may still take hours to read.
    """
    digest = new_digest()
    with open_source(path) as source:
        # Before the first byte is read: a sparse file takes no room on the disk, and may take hours to read.
        if most is not None and source.nbytes > most:
            raise CheckpointError(str(path), "", f"has {source.nbytes} bytes", f"at most {most}")
        for block in read_blocks(source, 0, source.nbytes):
            digest.update(block)
    return digest_text(digest)


def range_digest(source: Source, start: int, nbytes: int, *, cached_only: bool = False) -> str | None:
    """Return the digest of a range of a source.

    Args:
        source: what is read.
        start: of the range, in bytes.
        nbytes: of the range.
        cached_only: read what is in memory; None where that is not all of it, or the kernel cannot tell.

    Raises:
        CheckpointError: the file ends too soon, or the disk cannot be read.
    """
    digest = new_digest()
    if not cached_only:
        for block in read_blocks(source, start, nbytes):
            digest.update(block)
        return digest_text(digest)
    if source.fd is None or not hasattr(os, "RWF_NOWAIT"):
        return None
    with borrowed_block() as block:
        done = 0
        while done < nbytes:
            part = block[: min(BLOCK_BYTES, nbytes - done)]
            try:
                # RWF_NOWAIT fails with EAGAIN, or reads less, where a page is not in memory.
                n_read = os.preadv(source.fd, [part], start + done, os.RWF_NOWAIT)
            except OSError:
                return None
            if n_read == 0:
                return None
            digest.update(part[:n_read])
            done += n_read
    return digest_text(digest)


def text_digest(text: str) -> str:
    """Return the digest of a text's bytes as `storage.folder.Folder.write_text` writes them."""
    digest = new_digest()
    digest.update(text.encode("utf-8", "backslashreplace"))
    return digest_text(digest)

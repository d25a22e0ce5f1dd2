"""The checksum that S3 states of a whole object, computed here from its bytes."""

from __future__ import annotations

from lora_merge.storage.digests import checksum_text
from lora_merge.storage.reading import read_blocks
from lora_merge.storage.sources import open_source


def file_checksum(text: str) -> str | None:
    """Return the checksum of a file as records have it; None where the package that computes it is not installed.

    Args:
        text: names the file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        from awscrt.checksums import crc64nvme
    except ImportError:
        return None
    checksum = 0
    with open_source(text) as source:
        for block in read_blocks(source, 0, source.nbytes):
            checksum = crc64nvme(bytes(block), checksum)
    return checksum_text(checksum)

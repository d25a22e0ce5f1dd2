"""Output files at their full size: created with their header, and recognised by it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.shards import header_bytes
from lora_merge.storage.reading import read_into
from lora_merge.storage.writing import allocate, write_error, write_from

if TYPE_CHECKING:
    from lora_merge.core.shards import OutputFile
    from lora_merge.storage.folder import Folder
    from lora_merge.storage.sources import Source


def has_header(source: Source, file: OutputFile) -> bool:
    """Return True when a stored file has the size and, byte by byte, the header of a file that is to be written.

    Raises:
        CheckpointError: it cannot be read.
    """
    header = header_bytes(file)
    if source.nbytes != file.nbytes:
        return False
    found = bytearray(len(header))
    read_into(source, memoryview(found), 0)
    return found == header


def reserve(folder: Folder, file: OutputFile) -> None:
    """Create an output file at its full size: the header is written, the tensors are still zeros.

    Raises:
        WriteError: the disk is full or cannot be written.
    """
    path = folder.path / file.name
    with folder.writing(file.name, create=True) as fd:
        try:
            # A disk that is too small is found now, before anything is computed.
            allocate(fd, file.nbytes)
        except OSError as exc:
            raise write_error(path, exc) from exc
        write_from(fd, memoryview(header_bytes(file)), 0, path)

"""A small file that the user names on the command line: a regular file, or a pipe from the shell (`<(…)`)."""

from __future__ import annotations

from pathlib import Path

from lora_merge.errors import CheckpointError
from lora_merge.storage.small_files import read_bytes

_PIPES = ("/dev/fd/", "/proc/self/fd/")
"""Where shells put the pipe of ``<(…)``."""


def read_named(path: str, most: int) -> bytes:
    """Return the bytes of a small file or pipe.

    Args:
        path: as the user wrote it.
        most: bytes that it may have.

    Raises:
        CheckpointError: it is neither a regular file nor such a pipe, or is too long.
        OSError: it cannot be read.
    """
    if path != "/dev/stdin" and not path.startswith(_PIPES):
        return read_bytes(Path(path), most)
    with open(path, "rb") as stream:  # noqa: PTH123 - as the user wrote it
        # A pipe has no size: one byte more than allowed shows that it is too long.
        content = stream.read(most + 1)
    if len(content) > most:
        raise CheckpointError(path, "", f"has more than {most} bytes")
    return content

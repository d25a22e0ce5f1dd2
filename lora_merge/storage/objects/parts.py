"""Large objects in parts: their size, and the writer that hands them to the package obstore."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.errors import WriteError
from lora_merge.storage.objects.failures import writing

if TYPE_CHECKING:
    from obstore import WritableFile

    from lora_merge.storage.objects.store import Receipt

LEAST_PART_BYTES = 16 << 20
"""S3 demands 5 MiB; larger parts need fewer requests."""

MOST_PARTS = 9000
"""S3 takes 10 000, Azure 50 000."""

PARTS_UNDER_WAY = 4
"""Most parts of one file that are being sent, besides the one that is being filled."""

_MIB = 1 << 20


def part_bytes(nbytes: int) -> int:
    """Return the size of all parts of a file but the last, which may be smaller: R2 demands that they are equal.

    Args:
        nbytes: of the file.

    Example:
        >>> part_bytes(5 << 30) >> 20, part_bytes(2_000_000_000_000) >> 20
        (16, 212)
    """
    return max(LEAST_PART_BYTES, -(-nbytes // MOST_PARTS // _MIB) * _MIB)


class SizedUpload:
    """A file of a known size on its way into a store: its bytes are counted, and it has a receipt in the end.

    Args:
        text: the file's URL, as messages have it.
        nbytes: of the file.
    """

    def __init__(self, text: str, nbytes: int) -> None:
        self._text, self._nbytes, self._written = text, nbytes, 0
        self._receipt: Receipt | None = None

    @property
    def receipt(self) -> Receipt:
        """What was written.

        Raises:
            RuntimeError: it is asked for too early.
        """
        if self._receipt is None:
            raise RuntimeError(f"{self._text} is still being written")
        return self._receipt

    def closed_as(self, receipt: Receipt) -> None:
        """Note what the store says of the finished file."""
        self._receipt = receipt

    def _count(self, nbytes: int) -> None:
        """Count the next bytes.

        Raises:
            WriteError: there are more than announced.
        """
        self._written += nbytes
        if self._written > self._nbytes:
            raise self._wrong_size()

    def _check_whole(self) -> None:
        """Check that all bytes have come.

        Raises:
            WriteError: some have not.
        """
        if self._written != self._nbytes:
            raise self._wrong_size()

    def _wrong_size(self) -> WriteError:
        return WriteError(f"{self._text}: {self._written} bytes were written, expected {self._nbytes}")


class PartWriter(SizedUpload):
    """A file that goes up in parts (a `FileSink`).

    Args:
        upload: obstore's writer. **It keeps a reference to each buffer that it is given** until that is sent, so every
            part is a new one, and is not touched again.
        text: the file's URL, as messages have it.
        nbytes: of the file.
    """

    def __init__(self, upload: WritableFile, text: str, nbytes: int) -> None:
        super().__init__(text, nbytes)
        self._upload = upload
        # A small file needs no buffer of a whole part.
        self._part_bytes = min(part_bytes(nbytes), nbytes)
        self._part, self._filled = bytearray(), 0

    def write(self, block: memoryview) -> None:
        """Take the next bytes. The block may be reused afterwards.

        Raises:
            WriteError: the store refused something, or there are more bytes than announced.
        """
        block = block.cast("B")
        self._count(len(block))
        at = 0
        while at < len(block):
            if not self._part:
                self._part = bytearray(self._part_bytes)
            count = min(self._part_bytes - self._filled, len(block) - at)
            self._part[self._filled : self._filled + count] = block[at : at + count]
            at, self._filled = at + count, self._filled + count
            if self._filled == self._part_bytes:
                self._hand_over()

    def copy(self, source: str, start: int, nbytes: int) -> bool:  # noqa: ARG002 - obstore has no parts that are copies
        """Return False: the bytes must be read and written."""
        return False

    def finish(self) -> None:
        """Hand the last part over.

        Raises:
            WriteError: the store refused something, or bytes are missing.
        """
        self._check_whole()
        self._hand_over()

    def _hand_over(self) -> None:
        if self._filled:
            with writing(self._text):
                self._upload.write(memoryview(self._part)[: self._filled])
        # A new one: obstore holds the last until it is sent.
        self._part, self._filled = bytearray(), 0

"""A sink for files that are written from the first byte to the last: what comes early waits until its place comes."""

from __future__ import annotations

import contextlib
import tempfile
from typing import IO, TYPE_CHECKING, Protocol

from lora_merge.core.shards import header_bytes
from lora_merge.errors import WriteError
from lora_merge.storage.reading import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lora_merge.core.shards import OutputFile
    from lora_merge.core.tensor import TensorRef
    from lora_merge.storage.copy_runs import CopyRun
    from lora_merge.storage.sources import Source

HELD_BYTES = 64 << 20
"""Bytes of one file that wait in memory. More of them wait in a temporary file on this machine's disk."""


class Taker(Protocol):
    """What takes the bytes of one file, from the first to the last."""

    def write(self, block: memoryview) -> None:
        """Take the next bytes. The block may be reused afterwards.

        Raises:
            WriteError: the storage refused them.
        """


class InOrder:
    """Passes the bytes of some files on in their order; it is a `storage.destination.Sink`.

    A step may fill several slots at once (a weight and its scales), which need not be adjacent in the file. The bytes
    of the next slot are passed on, those of later ones are kept until the bytes before them have come.

    Args:
        files: those that are filled.
        takers: what takes the bytes of each, by its name.
        held_bytes: of each file that may wait in memory.
    """

    def __init__(
        self, files: tuple[OutputFile, ...], takers: Mapping[str, Taker], held_bytes: int = HELD_BYTES
    ) -> None:
        self._lines = {file.name: _Line(file, takers[file.name], held_bytes) for file in files}
        for line, file in zip(self._lines.values(), files, strict=True):
            line.write(0, memoryview(header_bytes(file)))

    @contextlib.contextmanager
    def copying(self, run: CopyRun, source: Source) -> Iterator[Callable[[memoryview], None]]:
        """Yield a function that takes the next bytes of a run, whose slots are adjacent."""
        del source
        first = run.slots[0]
        yield self._writer(first.file, first.start)

    @contextlib.contextmanager
    def open(self, slot: TensorRef) -> Iterator[Callable[[memoryview], None]]:
        """Yield a function that takes the next bytes of a slot."""
        yield self._writer(slot.file, slot.start)

    def _writer(self, file: str, start: int) -> Callable[[memoryview], None]:
        line, at = self._lines[file], start

        def write(block: memoryview) -> None:
            nonlocal at
            line.write(at, block)
            at += len(block)

        return write

    def at(self, file: str) -> int:
        """Return the number of bytes of a file that are passed on."""
        return self._lines[file].at

    def skip(self, file: str, nbytes: int) -> None:
        """Count the next bytes of a file as passed on: its storage has copied them by itself.

        Raises:
            WriteError: as for `write`.
        """
        self._lines[file].skip(nbytes)

    def finish(self) -> None:
        """Check that every byte of every file has come.

        Raises:
            WriteError: some have not.
        """
        for name, line in self._lines.items():
            if line.at != line.nbytes:
                sentence = f"{name}: has {line.at} of {line.nbytes} bytes"
                raise WriteError(
                    sentence, hint="run again with --resume; if this repeats, report it as a bug"
                )


class _Line:
    """The bytes of one file, waiting for their turn."""

    def __init__(self, file: OutputFile, taker: Taker, held_bytes: int) -> None:
        self.at, self.nbytes = 0, file.nbytes
        self._taker, self._held = taker, _Held(held_bytes)

    def write(self, start: int, block: memoryview) -> None:
        """Take bytes that belong at a place in the file; each byte comes once."""
        if start != self.at:
            assert start > self.at, "bytes of a file came twice"
            self._held.add(start, block)
            return
        if block:
            self._taker.write(block)
            self.skip(len(block))

    def skip(self, nbytes: int) -> None:
        """Move on, and pass on what has waited for this place."""
        self.at += nbytes
        while self.at in self._held:
            for block in self._held.taken(self.at):
                self._taker.write(block)
                self.at += len(block)


class _Held:
    """Bytes that came early, by their place in the file."""

    def __init__(self, most_bytes: int) -> None:
        self._room = most_bytes
        self._blocks: dict[int, bytes] = {}
        self._spooled: dict[int, tuple[int, int]] = {}
        self._spool: IO[bytes] | None = None
        self._end = 0

    def __contains__(self, start: int) -> bool:
        return start in self._blocks or start in self._spooled

    def add(self, start: int, block: memoryview) -> None:
        """Keep a copy of some bytes."""
        # An empty tensor begins where the next one does, and would be taken for it.
        if not block:
            return
        if len(block) <= self._room:
            self._blocks[start] = bytes(block)
            self._room -= len(block)
            return
        try:
            if self._spool is None:
                # Without a name: it vanishes with this process, however that ends.
                self._spool = tempfile.TemporaryFile(prefix="lora-merge-")  # noqa: SIM115 - closed with this object
            self._spool.seek(self._end)
            self._spool.write(block)
        except OSError as exc:
            sentence = f"{tempfile.gettempdir()}: cannot hold {len(block)} bytes that are written later ({exc.strerror})"
            raise WriteError(sentence, hint="set TMPDIR to a disk with more room") from exc
        self._spooled[start] = self._end, len(block)
        self._end += len(block)

    def taken(self, start: int) -> Iterator[memoryview]:
        """Yield the bytes of a place, and forget them."""
        if start in self._blocks:
            block = self._blocks.pop(start)
            self._room += len(block)
            yield memoryview(block)
            return
        assert self._spool is not None
        at, nbytes = self._spooled.pop(start)
        self._spool.seek(at)
        while nbytes:
            found = self._spool.read(min(nbytes, BLOCK_BYTES))
            nbytes -= len(found)
            yield memoryview(found)

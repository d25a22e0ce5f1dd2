"""Copies: tensors that no delta touches, read once for every output that wants them and for their digests."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol

from lora_merge.core.tensor import TensorRecord
from lora_merge.storage.digests import digest_text, new_digest
from lora_merge.storage.reading import read_blocks
from lora_merge.storage.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from lora_merge.core.tensor import TensorRef
    from lora_merge.merging.worker.stopwatch import Stopwatch
    from lora_merge.storage.copy_runs import CopyRun
    from lora_merge.storage.sources import Source

COPY_BYTES = 1 << 18
"""Block size of a copy: small enough to be still in the processor's cache when it is digested and then written."""


class CopySink(Protocol):
    """Where copies go; `lora_merge.storage.destination.Sink` is one."""

    def copying(self, run: CopyRun, source: Source) -> AbstractContextManager[Callable[[memoryview], None]]:
        """Open the slots of a run; the result takes the next bytes of its sources, which are read from
        ``source``.
        """


def copy(wanted: Sequence[tuple[CopySink, CopyRun]], watch: Stopwatch) -> list[list[TensorRecord]]:
    """Copy one run of a source into every sink that wants it; return the records of each sink's tensors.

    A tensor's digest is taken of its *source*, of the bytes that are written.

    Args:
        wanted: the sinks, and the run as each has it: all of the same bytes.
        watch: counts the time.

    Raises:
        CheckpointError: a source cannot be read.
        WriteError: the disk is full or cannot be written.
    """
    watch.start()
    run = wanted[0][1]
    first = run.sources[0]
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_source(first.file))
        writes = [stack.enter_context(sink.copying(own, source)) for sink, own in wanted]
        digests = _Digests(run.sources)
        # Copying in the kernel (`copy_file_range`) and reading again for the digests takes a fifth to a half
        # more CPU time.
        for block in read_blocks(source, first.start, run.nbytes, COPY_BYTES):
            watch.lap("copy")
            # Of the source's bytes. Verification takes the digest again from the output, so equal digests
            # mean equal bytes.
            digests.take(block)
            watch.lap("digest")
            for write in writes:
                write(block)
            watch.lap("copy")
    found = digests.texts()
    return [
        [
            TensorRecord(slot.name, slot.file, slot.nbytes, digest, finite=True)
            for slot, digest in zip(own.slots, found, strict=True)
        ]
        for _, own in wanted
    ]


class _Digests:
    """Digests of adjacent tensors, taken while their bytes pass in blocks of any size."""

    def __init__(self, refs: Sequence[TensorRef]) -> None:
        self._sizes = [ref.nbytes for ref in refs]
        self._found: list[str] = []
        self._digest, self._n_taken = new_digest(), 0

    def take(self, block: memoryview) -> None:
        while block:
            room = self._sizes[len(self._found)] - self._n_taken
            self._digest.update(block[:room])
            self._n_taken += len(block[:room])
            block = block[room:]
            if self._n_taken == self._sizes[len(self._found)]:
                self._next()

    def texts(self) -> list[str]:
        """Return the digest of each tensor, once all bytes have passed."""
        while len(self._found) < len(self._sizes):  # the last ones are empty
            self._next()
        return self._found

    def _next(self) -> None:
        self._found.append(digest_text(self._digest))
        self._digest, self._n_taken = new_digest(), 0

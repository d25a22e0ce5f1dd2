"""Workers of a merge: they get a piece, and give back the records of its tensors.

A worker owns buffers and a device. It opens what it reads and writes by name, for each piece, so that the spec that it is
made from can be sent to another process.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.core.identity import Inputs
from lora_merge.core.work import Done
from lora_merge.deltas import Factors
from lora_merge.formats.safetensors import load
from lora_merge.merging.worker.copying import copy
from lora_merge.merging.worker.host import needs_torch
from lora_merge.merging.worker.merger import Merger, Order
from lora_merge.merging.worker.stopwatch import Stopwatch
from lora_merge.runtime.torch_threads import one_torch_thread
from lora_merge.storage.copy_runs import CopyRun
from lora_merge.storage.destination import Sink
from lora_merge.storage.input_files import Watch, told

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_merge.core.work import Piece


@dataclass(frozen=True, slots=True)
class CopySpec:
    """Makes workers that copy. They need no torch."""

    sinks: tuple[Sink, ...]
    """Where each output's bytes go, by its number."""

    inputs: Inputs
    """The files that may be read, as they were when the merge was planned."""

    @contextlib.contextmanager
    def make(self, n: int) -> Iterator[list[CopyWorker]]:
        """Yield n workers for the threads of one process."""
        yield [CopyWorker(self) for _ in range(n)]


@dataclass(frozen=True, slots=True)
class MergeSpec:
    """Makes workers that merge. Those of one process share stacks of factors, and torch, where it is needed, has one thread for each
    while they last.
    """

    sinks: tuple[Sink, ...]
    """Where each output's bytes go, by its number."""

    inputs: Inputs
    """The files that may be read, as they were when the merge was planned."""

    device: str = "cpu"
    """A torch device for the arithmetic."""

    tile_elements: int | None = None
    """Of a row tile; None: what suits the CPU's cache."""

    is_checked: bool = True
    """Look at part of every row as it passes, for the verification that follows."""

    has_torch: bool = True
    """False where nothing needs it, unless a value is not finite (`lora_merge.merging.worker.host`)."""

    @contextlib.contextmanager
    def make(self, n: int) -> Iterator[list[MergeWorker]]:
        """Yield n workers for the threads of one process; on leaving, torch has its threads again."""
        factors = Factors(load)
        with one_torch_thread(has_torch=self.has_torch):
            yield [MergeWorker(self, factors) for _ in range(n)]


def parted(pieces: Sequence[Piece]) -> tuple[list[Piece], list[Piece]]:
    """Return the merges that need nothing of torch, and the others."""
    found: tuple[list[Piece], list[Piece]] = [], []
    for piece in pieces:
        found[needs_torch(step for _, steps in piece.wanted for step in steps)].append(piece)
    return found


class CopyWorker:
    """Copies runs of tensors. A run that several outputs want is read once."""

    def __init__(self, spec: CopySpec) -> None:
        self._sinks, self._time = spec.sinks, Stopwatch()
        # Nothing is noted: the records of copies have the digests of what was read.
        self._watch = Watch(Inputs(spec.inputs.files), is_closed=True, is_noting=False)

    def __call__(self, piece: Piece) -> Done:
        """Copy one run to every output that wants it.

        Raises:
            CheckpointError: a source cannot be read, or has changed.
            WriteError: the disk is full or cannot be written.
        """
        wanted = [(self._sinks[number], CopyRun(steps)) for number, steps in piece.wanted]
        with told(self._watch):
            copied = copy(wanted, self._time)
        found = (
            (number, record)
            for (number, _), records in zip(piece.wanted, copied, strict=True)
            for record in records
        )
        return Done(tuple(found), self._time.taken(), self._watch.taken())


class MergeWorker:
    """Merges one stored weight for every output that wants it; it is read once."""

    def __init__(self, spec: MergeSpec, factors: Factors) -> None:
        self._sinks, self._time = spec.sinks, Stopwatch()
        # Any of the sinks will do: each order brings its own (`Merger.together`).
        self._merger = Merger(
            spec.sinks[0], spec.device, spec.tile_elements, self._time, factors, is_checked=spec.is_checked
        )
        self._watch = Watch(Inputs(spec.inputs.files), is_closed=True)

    def __call__(self, piece: Piece) -> Done:
        """Merge one weight into every output that wants it.

        Raises:
            CheckpointError: a source cannot be read, or has changed.
            WriteError: the disk is full or cannot be written.
            OutOfMemoryError: memory ran out.
        """
        orders = [Order(step, self._sinks[number]) for number, (step,) in piece.wanted]
        with told(self._watch):
            merged = self._merger.together(orders)
        found = (
            (number, record)
            for (number, _), records in zip(piece.wanted, merged, strict=True)
            for record in records
        )
        return Done(tuple(found), self._time.taken(), self._watch.taken())

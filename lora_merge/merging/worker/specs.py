"""Workers of a merge: they get a piece, and give back the records of its tensors.

A worker owns buffers and a device. It opens what it reads and writes by name, for each piece, so that the spec that it is
made from can be sent to another process.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.core.identity import Inputs, Place
from lora_merge.core.plan import Merge
from lora_merge.core.work import Done, Piece
from lora_merge.deltas import Factors
from lora_merge.formats.safetensors import load
from lora_merge.merging.worker.copying import copy
from lora_merge.merging.worker.early import Begun, can_begin
from lora_merge.merging.worker.merger import Merger, Order
from lora_merge.merging.worker.stopwatch import Stopwatch
from lora_merge.runtime.torch_threads import one_torch_thread
from lora_merge.storage.copy_runs import CopyRun
from lora_merge.storage.destination import Sink
from lora_merge.storage.input_files import Watch, told

if TYPE_CHECKING:
    from collections.abc import Iterator


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
    """Makes workers that merge. Those of one process share stacks of factors, and torch has one thread for each while
    they last.
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

    @contextlib.contextmanager
    def make(self, n: int) -> Iterator[list[MergeWorker]]:
        """Yield n workers for the threads of one process; on leaving, torch has its threads again."""
        factors = Factors(load)
        with one_torch_thread():
            yield [MergeWorker(self, factors) for _ in range(n)]


@dataclass(frozen=True, slots=True)
class BeginSpec:
    """Makes workers that begin merges while torch is loaded, in threads of this process."""

    sinks: tuple[Sink, ...]
    """Where each output's bytes go, by its number."""

    inputs: Inputs
    """The files that may be read, as they were when the merge was planned."""

    is_over: Callable[[], bool]
    """Returns True once torch is there: what is not begun then is left to those who need it."""

    tile_elements: int | None = None
    """Of a row tile; None: what suits the CPU's cache."""

    is_checked: bool = True
    """Look at part of every row as it passes, for the verification that follows."""

    @contextlib.contextmanager
    def make(self, n: int) -> Iterator[list[BeginWorker]]:
        """Yield n workers."""
        factors = Factors(load)
        yield [BeginWorker(self, factors) for _ in range(n)]


@dataclass(frozen=True, slots=True)
class BegunPiece:
    """A piece that was begun, and is to be finished."""

    piece: Piece
    begun: Begun
    busy: Mapping[str, float]
    """Seconds that it took so far, by stage."""

    readings: Mapping[Place, str]
    """The digest of each place that was read for it."""

    @property
    def nbytes(self) -> int:
        """Bytes that it writes."""
        return self.piece.nbytes


def can_be_begun(piece: Piece) -> bool:
    """Return whether a piece of one output can be begun without torch."""
    if len(piece.wanted) != 1:
        return False
    ((_, steps),) = piece.wanted
    return len(steps) == 1 and isinstance(steps[0].op, Merge) and can_begin(steps[0].op)


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


class BeginWorker:
    """Begins merges that need nothing of torch."""

    def __init__(self, spec: BeginSpec, factors: Factors) -> None:
        self._spec, self._time = spec, Stopwatch()
        self._merger = Merger(
            spec.sinks[0], "cpu", spec.tile_elements, self._time, factors, is_checked=spec.is_checked
        )
        self._watch = Watch(Inputs(spec.inputs.files), is_closed=True)

    def __call__(self, piece: Piece) -> BegunPiece | None:
        """Write the weight of a piece; None where it is left alone.

        Raises:
            CheckpointError: a source cannot be read, or has changed.
            WriteError: the disk is full or cannot be written.
            OutOfMemoryError: memory ran out.
        """
        if self._spec.is_over():
            return None
        ((number, (step,)),) = piece.wanted
        with told(self._watch):
            begun = self._merger.begin(Order(step, self._spec.sinks[number]))
        if begun is None:
            return None
        return BegunPiece(piece, begun, self._time.taken(), self._watch.taken())


class MergeWorker:
    """Merges one stored weight for every output that wants it; it is read once."""

    def __init__(self, spec: MergeSpec, factors: Factors) -> None:
        self._sinks, self._time = spec.sinks, Stopwatch()
        # Any of the sinks will do: each order brings its own (`Merger.together`).
        self._merger = Merger(
            spec.sinks[0], spec.device, spec.tile_elements, self._time, factors, is_checked=spec.is_checked
        )
        self._watch = Watch(Inputs(spec.inputs.files), is_closed=True)

    def __call__(self, piece: Piece | BegunPiece) -> Done:
        """Merge one weight into every output that wants it, or finish what was begun.

        Raises:
            CheckpointError: a source cannot be read, or has changed.
            WriteError: the disk is full or cannot be written.
            OutOfMemoryError: memory ran out.
        """
        return self._finished(piece) if isinstance(piece, BegunPiece) else self._merged(piece)

    def _finished(self, piece: BegunPiece) -> Done:
        with told(self._watch):
            records = self._merger.finish(piece.begun)
        if records is None:
            return self._merged(piece.piece)
        ((number, _),) = piece.piece.wanted
        busy = Counter(piece.busy)
        busy.update(self._time.taken())
        return Done(
            tuple((number, record) for record in records), busy, {**piece.readings, **self._watch.taken()}
        )

    def _merged(self, piece: Piece) -> Done:
        orders = [Order(step, self._sinks[number]) for number, (step,) in piece.wanted]
        with told(self._watch):
            merged = self._merger.together(orders)
        found = (
            (number, record)
            for (number, _), records in zip(piece.wanted, merged, strict=True)
            for record in records
        )
        return Done(tuple(found), self._time.taken(), self._watch.taken())

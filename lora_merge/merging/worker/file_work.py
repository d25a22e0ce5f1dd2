"""Workers that make whole output files, each from its first byte to its last."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_merge.core.identity import Inputs
from lora_merge.core.plan import Copy
from lora_merge.core.shards import OutputFile
from lora_merge.core.tensor import TensorRecord
from lora_merge.core.work import Done, Piece
from lora_merge.deltas import Factors
from lora_merge.errors import WriteError
from lora_merge.formats.safetensors import load
from lora_merge.merging.worker.copying import copy
from lora_merge.merging.worker.merger import Merger, Order
from lora_merge.merging.worker.stopwatch import Stopwatch
from lora_merge.runtime.torch_threads import one_torch_thread
from lora_merge.storage.copy_runs import LEAST_STORE_BYTES, CopyRun
from lora_merge.storage.destination import FilePlace
from lora_merge.storage.in_order import InOrder
from lora_merge.storage.input_files import Watch, told
from lora_merge.storage.sources import is_local, kept_open, open_source

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lora_merge.storage.objects.store import FileSink, Receipt


@dataclass(frozen=True, slots=True)
class FilePiece:
    """A whole output file, or several that steps fill together: what a worker gets."""

    files: tuple[OutputFile, ...]

    pieces: tuple[Piece, ...]
    """What fills them, in the order of the first slot of each."""

    @property
    def name(self) -> str:
        """The name of its first file."""
        return self.files[0].name

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class FileSpec:
    """Makes workers that fill whole files; they copy and merge."""

    place: FilePlace
    """Where the files go."""

    inputs: Inputs
    """The files that may be read, as they were when the merge was planned."""

    device: str = "cpu"
    """A torch device for the arithmetic."""

    tile_elements: int | None = None
    """Of a row tile; None: what suits the CPU's cache."""

    is_checked: bool = True
    """Look at part of every row as it passes, for the verification that follows."""

    copies: bool = False
    """Ask the store to copy runs that no delta touches (`FileSink.copy`)."""

    has_torch: bool = True
    """False where nothing needs it, unless a value is not finite (`lora_merge.merging.worker.host`)."""

    lock: str = ""
    """A file that each machine with a worker has to see, since the driver has made it where the output goes; empty for none."""

    @contextlib.contextmanager
    def make(self, n: int) -> Iterator[list[FileWorker]]:
        """Yield n workers for the threads of one process; on leaving, torch has its threads again.

        Raises:
            WriteError: this machine does not see the place of the output.
        """
        if self.lock and not os.path.exists(self.lock):  # noqa: PTH110 - as it was sent
            sentence = f"{self.lock}: is not on node {os.uname().nodename}, and the driver has made it"
            hint = "write to a filesystem that every node has at the same path, or to a store"
            raise WriteError(sentence, hint=hint)
        factors = Factors(load)
        with one_torch_thread(has_torch=self.has_torch):
            yield [FileWorker(self, factors) for _ in range(n)]


class FileWorker:
    """Makes one output file after the other, and leaves the evidence of each beside the output."""

    def __init__(self, spec: FileSpec, factors: Factors) -> None:
        self._spec, self._factors, self._time = spec, factors, Stopwatch()
        self._watch = Watch(Inputs(spec.inputs.files), is_closed=True)
        self._copying = Watch(Inputs(spec.inputs.files), is_closed=True, is_noting=False)
        self._merger: Merger | None = None

    def __call__(self, piece: FilePiece) -> Done:
        """Make the files of a piece.

        Raises:
            CheckpointError: a source cannot be read, or has changed.
            WriteError: the storage refused something.
            OutOfMemoryError: memory ran out.
        """
        records: list[TensorRecord] = []
        found: list[TensorRecord] = []
        with contextlib.ExitStack() as stack, kept_open():
            sinks = {
                file.name: stack.enter_context(self._spec.place.file(file.name, file.nbytes))
                for file in piece.files
            }
            lines = InOrder(piece.files, sinks)
            for one in piece.pieces:
                records += self._copied_by_store(one, lines, sinks) or self._made(one, lines)
            lines.finish()
            # Only now are the sinks left: a file that lacks a byte never gets its name.
        for file in piece.files:
            receipt = sinks[file.name].receipt
            own = [_stated(record, receipt) for record in records if record.file == file.name]
            self._spec.place.note(file.name, receipt, own)
            found += own
        return Done(tuple((0, record) for record in found), self._time.taken(), self._watch.taken())

    def _copied_by_store(
        self, piece: Piece, lines: InOrder, sinks: Mapping[str, FileSink]
    ) -> list[TensorRecord]:
        """Have the store copy a run of copies; return records without digests, or nothing where the bytes must be read."""
        ((_, steps),) = piece.wanted
        if not self._spec.copies or not isinstance(steps[0].op, Copy) or piece.nbytes < LEAST_STORE_BYTES:
            return []
        run = CopyRun(steps)
        first, file = run.sources[0], run.slots[0].file
        if is_local(first.file):
            return []
        # Opened to be compared with the version that was planned with.
        with told(self._copying), open_source(first.file):
            if not sinks[file].copy(first.file, first.start, run.nbytes):
                return []
        lines.skip(file, run.nbytes)
        return [TensorRecord(slot.name, file, slot.nbytes, "", finite=True) for slot in run.slots]

    def _made(self, piece: Piece, lines: InOrder) -> tuple[TensorRecord, ...]:
        """Carry out a run of copies, or one merge; return the records of its tensors."""
        ((_, steps),) = piece.wanted
        if isinstance(steps[0].op, Copy):
            # Nothing is noted: the records of copies have the digests of what was read.
            with told(self._copying):
                (copied,) = copy([(lines, CopyRun(steps))], self._time)
            return tuple(copied)
        if self._merger is None:
            spec = self._spec
            self._merger = Merger(
                lines, spec.device, spec.tile_elements, self._time, self._factors, is_checked=spec.is_checked
            )
        (step,) = steps
        with told(self._watch):
            (merged,) = self._merger.together([Order(step, lines)])
        return merged


def _stated(record: TensorRecord, receipt: Receipt) -> TensorRecord:
    """Return a record whose digest is the checksum of its file, where the tensor was not read.

    Raises:
        WriteError: the store has stated none.
    """
    if record.digest or not record.nbytes:
        return record
    if not receipt.checksum:
        sentence = f"{record.file}: the store copied bytes of it, and stated no checksum"
        raise WriteError(sentence, hint="run again with --copies stream")
    return replace(record, digest=receipt.checksum)

"""The driver of a merge: places → files → work for the workers → sealed, verified and published, one output or several at once.

It owns locks, journals, progress and clocks. Workers get a spec and pieces, and give back records (`lora_merge.core.work`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge import executors
from lora_merge.core.identity import Inputs
from lora_merge.core.report import Observer
from lora_merge.errors import CheckpointError
from lora_merge.merging import filling
from lora_merge.merging.budget import Budget
from lora_merge.merging.observer import Heard
from lora_merge.merging.staged import Staged, take_place, take_up
from lora_merge.merging.unchanged_inputs import check_names
from lora_merge.merging.worker import CopySpec, MergeSpec, TorchLoading, quick_turns
from lora_merge.runtime.interrupts import whole_interrupts
from lora_merge.runtime.shortage import memory_for
from lora_merge.storage.input_files import watching

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.core.work import Done, Piece, WorkerSpec
    from lora_merge.merging.preparing import Made, Prepared
    from lora_merge.storage.destination import Destination
    from lora_merge.storage.input_files import Watch


def write(group: Sequence[Prepared], budget: Budget, watch: Observer) -> Iterator[Made]:
    """Make every output, and read what they have in common once; yield what became of each when it is known.

    What goes wrong while they are made goes wrong for all of them. What is wrong with one alone, once it is filled, is
    its `Made.error`, and the others are finished.

    An observer that raises ends the run as an interrupt does: it says nothing against what was written.

    Args:
        group: what to make; all of one base, for one device and one executor.
        budget: for all of them together.
        watch: hears of phases and bytes.

    Raises:
        LoraMergeError: they cannot be made.
    """
    heard = Heard(watch)
    places: list[Destination] = []
    try:
        with whole_interrupts(), memory_for("writing the output"):
            for prepared in group:
                places.append(take_place(prepared))  # noqa: PERF401 - those that are taken have to be left
            loading = TorchLoading()  # from here on this thread imports nothing
            outputs = [
                take_up(prepared, place, budget.n_workers, heard)
                for prepared, place in zip(group, places, strict=True)
            ]
            _Driver(outputs, budget, heard).fill(loading)
    except BaseException as exc:
        _abort(places, exc, heard)
        raise
    for n, output in enumerate(outputs):
        try:
            with whole_interrupts():
                made = output.finish(heard)
            yield made
        except BaseException as exc:
            _abort(places[n:], exc, heard)
            raise


def _abort(places: Sequence[Destination], exc: BaseException, heard: Heard) -> None:
    """Leave some places as a fault demands; the error has the notes about them."""
    is_callers = isinstance(exc, GeneratorExit) or exc is heard.failure
    fault = KeyboardInterrupt() if is_callers else exc
    for place in places:
        place.abort(fault)
    if fault is not exc:
        for text in getattr(fault, "__notes__", ()):
            exc.add_note(text)


@dataclass(frozen=True, slots=True)
class _Driver:
    """Gives out work, and takes in what comes back: records to their outputs, seconds to the clocks."""

    outputs: Sequence[Staged]
    budget: Budget
    watch: Observer

    def fill(self, loading: TorchLoading) -> None:
        """Carry out every step that is not done: copies while torch loads, then the rest.

        Copies are flushed meanwhile; what is merged is on its way to the disk by itself.
        """
        outputs = self.outputs
        left = [(number, step) for number, output in enumerate(outputs) for step in output.left()]
        order = filling.Order([output.plan for output in outputs])
        known = [output.inputs for output in outputs]
        with self._clocks("copy"), quick_turns(), watching(*known, is_noting=False) as seen:
            self._reserve()
            copying = CopySpec(tuple(output.place.sink for output in outputs), _files(outputs))
            self._work("copying", copying, filling.copies(left, order), "cpu", seen)
            for output in outputs:
                output.place.rest()
        with self._clocks("load"):
            loading.wait()
        first = outputs[0].prepared
        with self._clocks("merge"), watching(*known) as seen:
            merging = MergeSpec(
                copying.sinks,
                copying.inputs,
                first.device,
                self.budget.tile_elements,
                is_checked=any(output.prepared.request.verify != "none" for output in outputs),
            )
            self._work("merging", merging, filling.merges(left, order), first.device, seen)
        for output in outputs:
            output.read(seen.inputs().readings)

    def _reserve(self) -> None:
        """Make the files of every output. A hard link moves the time of change of a base's file, which is known to be ours then."""
        for output in self.outputs:
            for path, before, after in output.reserve():
                for other in self.outputs:
                    other.renew(path, before, after)

    def _work(
        self,
        phase: str,
        spec: WorkerSpec[Piece, Done],
        pieces: Sequence[Piece],
        device: str,
        seen: Watch,
    ) -> None:
        """Have workers carry out some pieces.

        Raises:
            LoraMergeError: one of them failed.
        """
        self.watch.phase(phase, sum(piece.nbytes for piece in pieces))
        n_workers, name = self.budget.n_workers, self.outputs[0].prepared.request.executor
        run = executors.pick(n_workers, device, name)
        try:
            with contextlib.closing(run(spec, pieces, n_workers)) as results:
                for done in results:
                    self._take(done, seen)
        except CheckpointError:
            for output in self.outputs:
                check_names(output.inputs)  # a file that changes breaks in many ways
            raise

    def _take(self, done: Done, seen: Watch) -> None:
        """Take in what a worker has done with one piece.

        Raises:
            ChangedError: it read other bytes than were there before.
            WriteError: it cannot be noted on the disk.
        """
        for place, digest in done.readings.items():
            seen.read(place, digest)
        for number, records in filling.by_output(done.records).items():
            self.outputs[number].add(records)
            for record in records:
                self.watch.advance(record.nbytes)
                self.watch.done(record.name)
        for output in self.outputs:
            output.clock.add_busy(done.busy)

    @contextlib.contextmanager
    def _clocks(self, phase: str) -> Iterator[None]:
        """Count the time of a block to every output."""
        with contextlib.ExitStack() as stack:
            for output in self.outputs:
                stack.enter_context(output.clock(phase))
            yield


def _files(outputs: Sequence[Staged]) -> Inputs:
    """Return the files that all outputs are made from. What was read of them stays here: workers send what they read."""
    return Inputs({path: file for output in outputs for path, file in output.inputs.files.items()})

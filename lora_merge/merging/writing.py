"""The driver of a merge: places → files → pieces for the workers → sealed, verified and published, one output or several.

It owns locks, journals, progress and clocks. Workers get a spec and pieces, and give back records (`lora_merge.core.work`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_merge import executors
from lora_merge.core.identity import Inputs
from lora_merge.core.report import Observer
from lora_merge.errors import CheckpointError
from lora_merge.executors.pace import Pace
from lora_merge.merging import filling
from lora_merge.merging.budget import Budget
from lora_merge.merging.file_progress import FileProgress
from lora_merge.merging.observer import Heard
from lora_merge.merging.on_cluster import demand_of, lock_of, seen_elsewhere
from lora_merge.merging.staged import Staged, take_place, take_up
from lora_merge.merging.unchanged_inputs import check_names
from lora_merge.merging.worker import (
    CopySpec,
    FileSpec,
    MergeSpec,
    TorchLoading,
    needs_torch,
    parted,
    short_switch_interval,
)
from lora_merge.runtime.interrupts import as_keyboard_interrupt
from lora_merge.runtime.shortage import translate_out_of_memory
from lora_merge.storage.input_files import watching

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.core.work import Done, Piece, Work, WorkerSpec
    from lora_merge.merging.preparing import Made, Prepared
    from lora_merge.storage.destination import Destination
    from lora_merge.storage.input_files import Watch


_THREADS = frozenset({"auto", "threads", "serial"})
"""Executors whose workers are in this process, where torch is loaded."""


def write(group: Sequence[Prepared], budget: Budget, watch: Observer) -> Iterator[Made]:
    """Make every output in one pass over their base; yield the result of each as soon as it is known.

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
        with as_keyboard_interrupt(), translate_out_of_memory("writing the output"):
            for prepared in group:
                places.append(take_place(prepared))  # noqa: PERF401 - those that are taken have to be left
            # From here on, until torch is there, this thread imports nothing.
            loading = _loading(group)
            outputs = [
                take_up(prepared, place, budget.n_workers, heard)
                for prepared, place in zip(group, places, strict=True)
            ]
            _Driver(outputs, budget, heard, FileProgress(heard)).fill(loading)
    except BaseException as exc:
        _abort(places, exc, heard)
        raise
    for n, output in enumerate(outputs):
        try:
            with as_keyboard_interrupt():
                made = output.finish(heard)
            yield made
        except BaseException as exc:
            _abort(places[n:], exc, heard)
            raise


def _loading(group: Sequence[Prepared]) -> TorchLoading | None:
    """Begin to load torch, where some outputs need it; return None where none does."""
    steps = (step for prepared in group for step in prepared.planned.plan.steps)
    if group[0].device == "cpu" and not needs_torch(steps):
        return None
    return TorchLoading(executors.IMPORTS.get(group[0].request.executor, ()))


def _abort(places: Sequence[Destination], exc: BaseException, heard: Heard) -> None:
    """Leave the places as an error demands. The error gets the notes about what stays."""
    # GeneratorExit: the caller stopped asking for results. Neither says anything against what is written, so
    # both count as an interrupt and whole files stay.
    is_callers = isinstance(exc, GeneratorExit) or exc is heard.failure
    fault = KeyboardInterrupt() if is_callers else exc
    for place in places:
        place.abort(fault)
    if fault is not exc:
        for text in getattr(fault, "__notes__", ()):
            exc.add_note(text)


@dataclass(frozen=True, slots=True)
class _Driver:
    """Hands out pieces of work; gives the records that come back to their outputs, and the seconds to their clocks."""

    outputs: Sequence[Staged]
    budget: Budget
    watch: Observer
    progress: FileProgress

    def fill(self, loading: TorchLoading | None) -> None:
        """Carry out every step that is not done: copies while torch loads (a second or more), and the merges that need nothing of
        it; then all other merges.

        Copies are flushed meanwhile; what is merged is on its way to the disk by itself.

        Args:
            loading: None where torch is not needed.
        """
        if self.outputs[0].place.files is not None:
            self._fill_files(loading)
            return
        outputs = self.outputs
        left = [(number, step) for number, output in enumerate(outputs) for step in output.left()]
        order = filling.Order([output.plan for output in outputs])
        known = [output.inputs for output in outputs]
        with self._clocks("copy"), short_switch_interval(), watching(*known, is_noting=False) as seen:
            self._reserve()
            # The sinks are asked for after `_reserve`: only then is it known which files are links and need
            # no bytes.
            copying = CopySpec(tuple(output.place.sink for output in outputs), _files(outputs))
            self._work("copying", copying, filling.copies(left, order), "cpu", seen)
            # Merged tiles are written past the page cache, and a flush of their file would hold the writers
            # up.
            for output in outputs:
                output.place.rest()
        merging = MergeSpec(
            copying.sinks,
            copying.inputs,
            outputs[0].prepared.device,
            self.budget.tile_elements,
            is_checked=self._is_checked,
            has_torch=loading is not None,
        )
        with watching(*known) as seen:
            self._merge(loading, merging, filling.merges(left, order), seen)
        for output in outputs:
            output.read(seen.inputs().readings)

    @property
    def _is_checked(self) -> bool:
        """True where any output is verified: one worker makes all outputs of a piece, so then all are projected."""
        return any(output.prepared.request.verify != "none" for output in self.outputs)

    def _merge(
        self, loading: TorchLoading | None, spec: MergeSpec, pieces: Sequence[Piece], seen: Watch
    ) -> None:
        """Carry out merges: first, while torch is loaded, those that need nothing of it."""
        is_there = loading is not None and loading.is_over
        alone, others = parted(pieces) if self._is_in_threads and not is_there else ([], pieces)
        with self._clocks("merge"), short_switch_interval():
            if alone:
                self._work("merging", replace(spec, has_torch=False), alone, spec.device, seen)
        self._wait(loading)
        # What is told of the workers is told here where there is nothing to merge.
        if others or not alone:
            with self._clocks("merge"):
                self._work("merging", spec, others, spec.device, seen)

    @property
    def _is_in_threads(self) -> bool:
        """True where workers are threads of this process, and do their arithmetic on the CPU."""
        first = self.outputs[0].prepared
        return first.device == "cpu" and first.request.executor in _THREADS

    def _wait(self, loading: TorchLoading | None) -> None:
        """Wait until torch is loaded, where it is needed."""
        with self._clocks("load"):
            if loading is None:
                return
            if not loading.is_over:
                self.watch.phase("loading torch", 0)
            loading.wait()

    def _fill_files(self, loading: TorchLoading | None) -> None:
        """Have workers make each file of the one output that is not there, from its first byte to its last."""
        (output,) = self.outputs
        self._wait(loading)
        device = output.prepared.device
        with self._clocks("merge"), watching(output.inputs) as seen:
            self._reserve()
            is_checked = output.prepared.request.verify != "none"
            # Asked for after `_reserve`: only then has the place its lock.
            place = output.place.files
            assert place is not None
            with self.progress.hearing(place, output.plan.files) as told:
                is_elsewhere = output.prepared.request.executor == executors.RAY
                inputs = _files([output])
                spec = FileSpec(
                    told,
                    seen_elsewhere(inputs) if is_elsewhere else inputs,
                    device,
                    self.budget.tile_elements,
                    is_checked=is_checked,
                    copies=output.prepared.copies,
                    has_torch=loading is not None,
                    lock=lock_of(output.prepared.out) if is_elsewhere else "",
                )
                self._work("merging", spec, output.left_files(), device, seen)
        output.read(seen.inputs().readings)

    def _reserve(self) -> None:
        """Create the files of every output."""
        for output in self.outputs:
            # Other outputs of the same base must not take the new ctime of a linked file for a change.
            for path, before, after in output.reserve():
                for other in self.outputs:
                    other.renew(path, before, after)

    def _work(
        self,
        phase: str,
        spec: WorkerSpec[Work, Done],
        pieces: Sequence[Work],
        device: str,
        seen: Watch,
    ) -> None:
        """Have workers carry out some pieces.

        Raises:
            LoraMergeError: a piece failed.
        """
        total = sum(piece.nbytes for piece in pieces)
        self.watch.phase(phase, total)
        n_workers, request = self.budget.n_workers, self.outputs[0].prepared.request
        pace = Pace(self.budget.n_first or n_workers, n_workers)
        demand = None
        if request.executor == executors.RAY:
            demand = demand_of(
                request, self.budget, device, lambda text: self.watch.phase(text or phase, total)
            )
        run = executors.pick(
            n_workers, device, request.executor, demand, pace if self.budget.n_first else None
        )
        with self._explaining(), contextlib.closing(run(spec, pieces, n_workers)) as results:
            for done in results:
                self._take(done, seen)
        if phase == "merging":
            for output in self.outputs:
                output.workers = self._workers(pace, len(pieces))

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """Look at the names of the inputs after an error about one: a file that changes breaks in many ways.

        Raises:
            ChangedError: an input has changed.
        """
        try:
            yield
        except CheckpointError:
            for output in self.outputs:
                check_names(output.inputs)
            raise

    def _workers(self, pace: Pace, n_pieces: int) -> dict[str, int | str]:
        """Return how many workers did some pieces, and why (`Report.workers`)."""
        n, why = pace.n, "as asked for" if self.budget.is_asked else pace.why
        if n_pieces < n:
            n, why = n_pieces, "each has one tensor or file"
        return {"n": n, "why": why}

    def _take(self, done: Done, seen: Watch) -> None:
        """Take in the result of one piece.

        Raises:
            ChangedError: it read other bytes than were there before.
            WriteError: it cannot be noted on the disk.
        """
        for place, digest in done.readings.items():
            seen.read(place, digest)
        for number, records in filling.by_output(done.records).items():
            self.outputs[number].add(records)
            self.progress.take(records)
        for output in self.outputs:
            output.clock.add_busy(done.busy)

    @contextlib.contextmanager
    def _clocks(self, phase: str) -> Iterator[None]:
        """Count the time of a block to every output: they share the work of it."""
        with contextlib.ExitStack() as stack:
            for output in self.outputs:
                stack.enter_context(output.clock(phase))
            yield


def _files(outputs: Sequence[Staged]) -> Inputs:
    """Return the input files of all outputs, without what was read of them: a worker sends only what it reads itself."""
    return Inputs({path: file for output in outputs for path, file in output.inputs.files.items()})

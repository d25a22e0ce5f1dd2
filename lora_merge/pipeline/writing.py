"""plans → (resume) → reserve → copy → merge → seal → verify → publish: one output, or several of one base in one pass."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_merge import executors
from lora_merge.core.budget import Budget
from lora_merge.core.checkpoint import CONFIG_FILE
from lora_merge.core.identity import Inputs
from lora_merge.core.interrupts import whole_interrupts
from lora_merge.core.plan import Copy, Merge, MergePlan
from lora_merge.core.report import NOT_VERIFIED, Issue, Observer, Verdict, note, survival_issues
from lora_merge.core.shortage import memory_for
from lora_merge.core.stretches import Stretch, stretches, whole_copies
from lora_merge.core.tensor import TensorRecord
from lora_merge.errors import CheckpointError, VerifyError, WriteError
from lora_merge.io import staging
from lora_merge.io.journal import FILE, Journal
from lora_merge.io.side_files import MANIFEST_FILE
from lora_merge.merge import (
    Merger,
    Order,
    Stopwatches,
    TorchLoading,
    copy,
    one_torch_thread,
    quick_turns,
)
from lora_merge.pipeline.clock import Clock
from lora_merge.pipeline.effect import check_effect
from lora_merge.pipeline.heard import Heard
from lora_merge.pipeline.inputs import changed_times, check, check_copied, check_names, used_by
from lora_merge.pipeline.planning import Planned, check_strict
from lora_merge.pipeline.provenance import provenance_of
from lora_merge.pipeline.resuming import fingerprint, finished
from lora_merge.requests.recording import record_of
from lora_merge.storage.input_files import in_threads, watching
from lora_merge.storage.sources import identity_at
from lora_merge.verify import verify as check_output
from lora_merge.writers import HfCheckpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from lora_merge.core.identity import FileIdentity, Place
    from lora_merge.core.plan import Step
    from lora_merge.core.tensor import Survival
    from lora_merge.executors.work import Work


MARKS = (CONFIG_FILE, MANIFEST_FILE)
"""Files that show that a directory is a model; the second also where the first is lost."""


@dataclass
class Output:
    """One output while it is made."""

    planned: Planned
    out: Path
    inputs: Inputs
    device: str
    clock: Clock = field(default_factory=Clock)
    notes: list[Issue] = field(default_factory=list)
    """What is worth knowing about it."""

    records: list[TensorRecord] = field(default_factory=list)
    verdict: Verdict = NOT_VERIFIED
    error: Exception | None = None
    """What it failed of, where others did not; one that is no `LoraMergeError` is a bug."""

    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def plan(self) -> MergePlan:
        """Return the plan."""
        return self.planned.plan

    @property
    def survival(self) -> dict[str, Survival]:
        """Return what became of each delta."""
        return {record.name: record.survival for record in self.records if record.survival}

    def take_place(self) -> None:
        """Take the place beside the output's name.

        Raises:
            WriteError: another run holds it, or it cannot be made.
        """
        request = self.planned.request
        place = staging.staging(
            self.out,
            resume=request.resume,
            overwrite=request.overwrite,
            marks=MARKS,
            inputs=self.planned.read_files(),
        )
        self.stage = self._stack.enter_context(place)
        self._stack.enter_context(memory_for("writing the output"))
        self.writer = HfCheckpoint(self.stage.folder)
        digests = [use.adapter.digest for use in self.planned.uses]
        options = record_of(request) | {"device": self.device}
        self.merge = fingerprint(self.plan, self.inputs, digests, options)

    def begin(self, n_workers: int, watch: Observer) -> None:
        """Take up what an interrupted run left there, and begin the journal of this one.

        Raises:
            WriteError: it cannot be written.
        """
        if self.planned.request.resume:
            self._resume(self.merge, n_workers, watch)
        self.flushing = self._stack.enter_context(staging.Flushing(self.stage.folder))
        self.journal = self._stack.enter_context(
            Journal(self.stage.home, self.merge, self.records, changed_times(self.inputs))
        )

    def _resume(self, merge: str, n_workers: int, watch: Observer) -> None:
        """Take over the records of what an interrupted run has written."""
        with self.clock("resume"), quick_turns():
            found = finished(self.plan, self.inputs, self.stage, self.writer, merge, n_workers, watch)
        subject, n_tensors = str(self.out), len(self.plan.steps)
        if found:
            sentence = (
                f"{len(found)} of {n_tensors} tensors were there from an interrupted run, as it wrote them"
            )
            self.notes.append(note("resumed", subject, sentence))
        elif found is None and self.stage.journal.exists():
            sentence = (
                "an interrupted run was of another merge (other inputs, options or versions): begun anew"
            )
            self.notes.append(note("not-resumed", subject, sentence))
        self.records = found or []

    def left(self) -> list[Step]:
        """Return what is still to be done."""
        done = {record.name for record in self.records}
        return [step for step in self.plan.steps if not done.issuperset(slot.name for slot in step.slots)]

    def reserve(self) -> list[tuple[str, FileIdentity, FileIdentity]]:
        """Make the files, those that nothing changes as links where that is wanted.

        Returns:
            The files of the base that got links: the identity of each before and after.

        Raises:
            CheckpointError: a file of the base cannot be read.
            WriteError: the disk is full or cannot be written.
        """
        wanted = self.planned.request.link
        linked = sorted(set(whole_copies(self.plan).values()) & self.inputs.files.keys())
        before = {path: identity_at(path) for path in linked if wanted == "hard"}
        if wanted != "copy":
            refused = self.writer.link(self.plan, wanted or "reflink")
            if refused and wanted:
                n_files, why = len(refused), next(iter(refused.values()))
                sentence = (
                    f"the disk makes no {wanted} links here ({why}), so {n_files} of its files were copied"
                )
                self.notes.append(note("link", str(self.out), sentence))
        self.writer.reserve(self.plan)
        return [(path, identity, identity_at(path)) for path, identity in before.items()]

    def finish(self, watch: Observer) -> None:
        """Seal what is filled, verify it and give it its name.

        Raises:
            ChangedError: an input is not what it was.
            VerifyError: the verification says no.
            PlanError: there are warnings, and they count as errors.
            WriteError: the disk does not take it.
        """
        request = self.planned.request
        check_names(self.inputs)
        with self.clock("seal"), watching(self.inputs) as seen:
            sealed = self.writer.seal(self.plan, self.records, provenance_of(self.planned))
        with self.clock("seal"):
            self.inputs = seen.inputs()
            check_copied(self.inputs, self.plan, self.stage.folder.path)
            used = used_by(self.plan.steps, self.records)
            check(self.inputs, used, all_bytes=request.verify == "full")
        if request.verify == "none":
            self._flush(watch)
        else:
            self._verify(request.verify, sealed, used, watch)
            check_names(self.inputs)
        check_effect(self.planned, self.stage.output, self.survival)
        self.notes += (*self.verdict.notes, *survival_issues(self.survival))
        check_strict(self.notes, strict=request.strict)
        with self.clock("publish"):
            watch.phase("publishing", 0)
            staging.publish(self.stage)
        self._stack.close()

    def _verify(
        self,
        level: Literal["sample", "full"],
        sealed: Mapping[str, str],
        used: Mapping[Place, str],
        watch: Observer,
        *,
        is_last: bool = False,
    ) -> None:
        """Verify what is staged, and wait until the disk has it.

        A filesystem may set the time of a change late (network filesystems do), or something else writes there. So what
        changed meanwhile is verified once more, and then in full.

        Args:
            level: how much of it is read.
            sealed: the digest of what was to be written into each file around the weights.
            used: the digest of what was read of each place of an input.
            watch: hears of the phase.
            is_last: it may not change again.

        Raises:
            ChangedError: an input is not what it was.
            VerifyError: the verification says no.
            WriteError: the disk does not take it, or it changes again.
        """
        folder = self.stage.folder
        before = folder.listing()
        with self.clock("verify"), one_torch_thread():
            watch.phase("verifying", 0)
            self.verdict = check_output(self.plan, folder.path, self.records, level, sealed)
        if not self.verdict.ok:
            check_names(self.inputs)
            check(self.inputs, used)  # an input that changes meanwhile looks like a wrong output
            raise VerifyError(self.verdict)
        self._flush(watch)
        after = folder.listing()
        if after == before:
            return
        if is_last or {name: seen[:2] for name, seen in after.items()} != {
            name: seen[:2] for name, seen in before.items()
        }:
            hint = "run again when nothing else writes to it"
            raise WriteError(f"{folder.path}: changed while it was verified", hint=hint)
        self._verify("full", sealed, used, watch, is_last=True)

    def _flush(self, watch: Observer) -> None:
        """Wait until the disk has what is staged."""
        with self.clock("flush"):
            watch.phase("flushing", 0)
            self.flushing.wait()

    def finish_or_fail(self, watch: Heard) -> None:
        """Finish it; what is wrong with it is its `error`, whatever it is: the other outputs are whole."""
        try:
            with memory_for("writing the output"):
                self.finish(watch)
        except Exception as exc:
            if exc is watch.failure:  # the caller's own
                raise
            self.fail(exc)
            self.error = exc

    def fail(self, exc: BaseException) -> None:
        """Leave the place as the fault demands: what is whole stays after some, and the error has a note about it."""
        stage: staging.Stage | None = getattr(self, "stage", None)
        if stage is not None and stage.is_published():
            with contextlib.suppress(WriteError):
                stage.home.remove(FILE)  # nobody is to go on from there
        with contextlib.suppress(type(exc)):
            self._stack.__exit__(type(exc), exc, exc.__traceback__)


def write(outputs: Sequence[Output], device: str, budget: Budget, watch: Observer) -> Iterator[Output]:
    """Make every output, and read what they have in common once; yield each when it has its name.

    What goes wrong while they are made goes wrong for all of them. What is wrong with one alone, once it is filled, is
    its `Output.error`, and the others are finished.

    An observer that raises ends the run as an interrupt does: it says nothing against what was written.

    Raises:
        LoraMergeError: they cannot be made.
    """
    watch = heard = Heard(watch)
    try:
        with whole_interrupts(), memory_for("writing the output"):
            for output in outputs:
                output.take_place()
            loading = TorchLoading()  # from here on this thread imports nothing
            for output in outputs:
                output.begin(budget.n_workers, watch)
            _fill(outputs, device, budget, watch, loading)
    except BaseException as exc:
        _fail(outputs, exc, heard)
        raise
    for n, output in enumerate(outputs):
        try:
            with whole_interrupts():
                output.finish_or_fail(heard)
            yield output
        except BaseException as exc:
            _fail(outputs[n:], exc, heard)
            raise


def _fail(outputs: Sequence[Output], exc: BaseException, heard: Heard) -> None:
    """Leave the places of some outputs as a fault demands; the error has the notes about them."""
    is_callers = isinstance(exc, GeneratorExit) or exc is heard.failure
    fault = KeyboardInterrupt() if is_callers else exc
    for output in outputs:
        output.fail(fault)
    if fault is not exc:
        for text in getattr(fault, "__notes__", ()):
            exc.add_note(text)


def _fill(
    outputs: Sequence[Output], device: str, budget: Budget, watch: Observer, loading: TorchLoading
) -> None:
    """Carry out every step that is not done: copies while torch loads, then the rest.

    Copies are flushed meanwhile; what is merged is on its way to the disk by itself.
    """
    watches = Stopwatches()
    crew = _Crew(outputs, budget, watch)
    left = [(output, step) for output in outputs for step in output.left()]
    copies = [(output, step) for output, step in left if isinstance(step.op, Copy)]
    known = [output.inputs for output in outputs]
    with _each_clock(outputs, "copy"), quick_turns(), watching(*known, is_noting=False):
        _reserve(outputs)
        crew.work("copying", _copier(watches), _shared_stretches(outputs, copies), "cpu")
        for output in outputs:
            output.flushing.rest()
    with _each_clock(outputs, "load"):
        loading.wait()
    with _each_clock(outputs, "merge"), one_torch_thread(), watching(*known) as seen:
        is_checked = any(output.planned.request.verify != "none" for output in outputs)
        merger = Merger(outputs[0].writer, device, budget.tile_elements, watches, is_checked=is_checked)
        orders = _shared_orders((output, step) for output, step in left if isinstance(step.op, Merge))
        crew.work("merging", lambda work: _merged(merger, work), orders, device)
    for output in outputs:
        output.clock.busy_seconds.update(watches.seconds())
        output.inputs = output.inputs.with_readings(seen.inputs().readings)


def _reserve(outputs: Sequence[Output]) -> None:
    """Make the files of every output. A hard link moves the time of change of a base's file, which is known to be ours then."""
    for output in outputs:
        for path, before, after in output.reserve():
            for other in outputs:
                other.inputs = other.inputs.renewed(path, before, after)


@dataclass(frozen=True, slots=True)
class _Copies:
    """One stretch of the base, and the outputs that want it."""

    wanted: tuple[tuple[Output, Stretch], ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes that are written."""
        return sum(stretch.nbytes for _, stretch in self.wanted)


@dataclass(frozen=True, slots=True)
class _Orders:
    """One stored tensor, and what several outputs make of it."""

    wanted: tuple[tuple[Output, Order], ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes that are written."""
        return sum(order.step.nbytes for _, order in self.wanted)


_Done = list[tuple[Output, Sequence[TensorRecord]]]
"""The records that a piece of work leaves, output by output."""


def _shared_stretches(outputs: Sequence[Output], copies: Iterable[tuple[Output, Step]]) -> list[_Copies]:
    """Return copies in stretches, those of the same source together."""
    own: dict[int, list[Step]] = {id(output): [] for output in outputs}
    for output, step in copies:
        own[id(output)].append(step)
    found: dict[tuple[object, ...], list[tuple[Output, Stretch]]] = {}
    for output in outputs:
        for stretch in stretches(own[id(output)]):
            key = (stretch.sources[0].file, stretch.sources[0].start, stretch.nbytes)
            found.setdefault(key, []).append((output, stretch))
    return [_Copies(tuple(wanted)) for wanted in found.values()]


def _shared_orders(merges: Iterable[tuple[Output, Step]]) -> list[_Orders]:
    """Return merges, those whose source may be read once for several outputs together."""
    found: dict[tuple[object, ...], list[tuple[Output, Order]]] = {}
    for output, step in merges:
        order = Order(step, output.writer)
        found.setdefault(order.alike(), []).append((output, order))
    return [_Orders(tuple(wanted)) for wanted in found.values()]


def _copier(watches: Stopwatches) -> Callable[[_Copies], _Done]:
    """Return what copies a stretch into every output that wants it; it is read once."""

    def copied(work: _Copies) -> _Done:
        records = copy([(output.writer, stretch) for output, stretch in work.wanted], watches)
        return [(output, own) for (output, _), own in zip(work.wanted, records, strict=True)]

    return copied


def _merged(merger: Merger, work: _Orders) -> _Done:
    """Make one stored tensor into that of every output that wants it."""
    made = merger.together([order for _, order in work.wanted])
    return [(output, records) for (output, _), records in zip(work.wanted, made, strict=True)]


@dataclass(frozen=True, slots=True)
class _Crew:
    """Whoever does the work of a phase."""

    outputs: Sequence[Output]
    budget: Budget
    watch: Observer

    def work(self, phase: str, do: Callable[[Work], _Done], work: Sequence[Work], device: str) -> None:
        """Carry out some work; the records that it leaves go to the outputs, and into their journals."""
        self.watch.phase(phase, sum(piece.nbytes for piece in work))
        n_workers = self.budget.n_workers
        try:
            for done in executors.pick(n_workers, device)(in_threads(do), work, n_workers):
                for output, records in done:
                    output.journal.add(records)
                    output.records += records
                    for record in records:
                        self.watch.advance(record.nbytes)
                        self.watch.done(record.name)
        except CheckpointError:
            for output in self.outputs:
                check_names(output.inputs)  # a file that changes breaks in many ways
            raise


@contextlib.contextmanager
def _each_clock(outputs: Sequence[Output], phase: str) -> Iterator[None]:
    """Count the time of a block to every output."""
    with contextlib.ExitStack() as stack:
        for output in outputs:
            stack.enter_context(output.clock(phase))
        yield

"""One output while it is made: resumed or begun, filled, sealed, verified, published."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lora_merge.checks.evidence import HERE, Elsewhere, Evidence
from lora_merge.checks.finite import finite
from lora_merge.checks.reckoners import reckoners
from lora_merge.checks.verdict import verify as check_output
from lora_merge.core.report import NOT_VERIFIED, Issue, Observer, Verdict, note
from lora_merge.errors import PlanError, VerifyError, WriteError
from lora_merge.formats.weight_files import place_of
from lora_merge.merging.base_values import check_base
from lora_merge.merging.by_file import file_pieces
from lora_merge.merging.effect import check_effect
from lora_merge.merging.filling import Unfinished
from lora_merge.merging.hf_checkpoint import seal
from lora_merge.merging.made_from import provenance_of
from lora_merge.merging.preparing import Made
from lora_merge.merging.resuming import fingerprint, finished
from lora_merge.merging.survival import check_loss, survival_issues
from lora_merge.merging.unchanged_inputs import (
    changed_times,
    check,
    check_copied,
    check_names,
    lasting,
    portable,
    used_by,
)
from lora_merge.merging.worker import needs_torch, short_switch_interval
from lora_merge.planning.run import check_strict
from lora_merge.requests.recording import record_of
from lora_merge.runtime.clock import Clock
from lora_merge.runtime.machine import usable_cores
from lora_merge.runtime.shortage import translate_out_of_memory
from lora_merge.storage.copy_runs import RUN_BYTES, STORE_RUN_BYTES, whole_copies
from lora_merge.storage.digests import is_of_file
from lora_merge.storage.input_files import watching
from lora_merge.storage.sources import identity_at, is_local
from lora_merge.words import counted, listing, size_text

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from lora_merge.core.identity import FileIdentity, Inputs, Place
    from lora_merge.core.plan import MergePlan, Step
    from lora_merge.core.tensor import Survival, TensorRecord
    from lora_merge.merging.observer import Heard
    from lora_merge.merging.parts import Part
    from lora_merge.merging.preparing import Prepared
    from lora_merge.merging.worker import FilePiece
    from lora_merge.storage.destination import Destination
    from lora_merge.storage.dirs import Listing


_LINKS = {"reflink": "reflinks", "hard": "hard links"}


def take_place(prepared: Prepared) -> Destination:
    """Lock the place of an output for this run.

    Raises:
        WriteError: another run holds it, or it cannot be made.
    """
    return prepared.storage.open(prepared.wish)


def take_up(prepared: Prepared, place: Destination, n_workers: int, watch: Observer) -> Staged:
    """Begin an output; with --resume, from the tensors that an interrupted run has finished.

    Raises:
        WriteError: left-over files cannot be removed.
    """
    planned, clock = prepared.planned, Clock(prepared.seconds)
    digests = [use.adapter.digest for use in planned.uses]
    # A GPU's bits may differ from the CPU's, so a run on another device is another merge.
    options = record_of(prepared.request) | {"device": prepared.device}
    known = lasting(planned.inputs)
    if place.files is not None:
        # Another machine may go on: what is only true of files of this one is left out.
        own = {file for use in planned.uses for file in use.adapter.files}
        known = portable(planned.inputs, own)
    merge = fingerprint(planned.plan, known, digests, options)
    if not prepared.wish.resume:
        return Staged(prepared, place, merge, clock)
    with clock("resume"), short_switch_interval():
        left, is_checked = place.left(merge), prepared.request.verify != "none"
        found = finished(planned.plan, planned.inputs, place, left, n_workers, watch, is_checked=is_checked)
    if prepared.wish.shared:
        # Each part goes on from what the others have made: that is no news, and gets no note.
        _check_sealable(prepared, found or ())
        return Staged(prepared, place, merge, clock, found or ())
    n_tensors, subject = sum(len(step.writes) for step in planned.plan.steps), prepared.out
    notes: list[Issue] = []
    if found:
        sentence = (
            f"resumed: an interrupted run had already written {len(found)} of {counted(n_tensors, 'tensor')}"
        )
        notes = [note("resumed", subject, sentence)]
    elif found is None and left.has_journal:
        sentence = "started from the beginning: the interrupted run had other inputs, options or versions"
        notes = [note("not-resumed", subject, sentence)]
    return Staged(prepared, place, merge, clock, found or (), notes)


def _check_sealable(prepared: Prepared, records: Sequence[TensorRecord]) -> None:
    """Check that every file is there, where an output is to be sealed.

    Raises:
        WriteError: some are missing.
    """
    plan = prepared.planned.plan
    missing = sorted({file.name for file in plan.files} - {record.file for record in records})
    if prepared.request.seal and missing:
        sentence = f"{prepared.out}: {len(missing)} of {counted(len(plan.files), 'file')} are missing: {listing(missing)}"
        raise WriteError(
            sentence, hint="run all parts to their end, with the same inputs and options; then --seal"
        )


class Staged:
    """One output while it is made; only the driver has it. Workers have a spec, and send back records.

    Args:
        prepared: what it is to be.
        place: where it goes; this run holds it.
        merge: the fingerprint of the run.
        clock: counts its time.
        records: of what is written already.
        notes: what is worth knowing about it.
    """

    def __init__(
        self,
        prepared: Prepared,
        place: Destination,
        merge: str,
        clock: Clock,
        records: Sequence[TensorRecord] = (),
        notes: Sequence[Issue] = (),
    ) -> None:
        self.prepared, self.place, self.clock = prepared, place, clock
        self.inputs: Inputs = prepared.planned.inputs
        """The files that are read: their identities and the digests of what was found in them."""

        self.workers: dict[str, int | str] = {}
        """How many workers merged; the driver says it."""

        self._merge, self._notes = merge, list(notes)
        self._verdict: Verdict = NOT_VERIFIED
        self._records = list(records)
        self._unfinished = Unfinished(self.plan, records)

    def renew(self, path: str, before: FileIdentity, after: FileIdentity) -> None:
        """Replace the identity of a base's file that this run itself has changed, by a hard link."""
        self.inputs = self.inputs.renewed(path, before, after)

    def read(self, readings: Mapping[Place, str]) -> None:
        """Add the digests of what workers have read of the inputs."""
        self.inputs = self.inputs.with_readings(readings)

    @property
    def plan(self) -> MergePlan:
        """The plan of this output."""
        return self.prepared.planned.plan

    def left(self) -> list[Step]:
        """Return the steps with a tensor that is not written yet, in the order of the plan."""
        done = {record.name for record in self._records}
        return [step for step in self.plan.steps if not done.issuperset(slot.name for slot in step.slots)]

    def left_files(self) -> list[FilePiece]:
        """Return the files that are not written yet, as pieces of work; the largest first."""
        left, part = self._pieces({record.file for record in self._records}), self.prepared.part
        # All files are shared out, done or not: so every process gets the same share, whenever it asks.
        return left if part is None else [piece for piece in part.share(self._pieces()) if piece in left]

    def _pieces(self, done: Collection[str] = ()) -> list[FilePiece]:
        """Return the files of the output as pieces of work, but for those that are done."""
        return file_pieces(self.plan, done, STORE_RUN_BYTES if self.prepared.copies else RUN_BYTES)

    def reserve(self) -> list[tuple[str, FileIdentity, FileIdentity]]:
        """Create the output's files at their full size. Files that no delta touches become links, where that is
        wanted and possible.

        Returns:
            The files of the base that got links: the identity of each before and after.

        Raises:
            CheckpointError: a file of the base cannot be read.
            WriteError: the disk is full or cannot be written.
        """
        wanted = self.prepared.request.link
        # Only a file of this machine can have a link.
        sources = {name: file for name, file in whole_copies(self.plan).items() if is_local(file)}
        linked = sorted(set(sources.values()) & self.inputs.files.keys())
        # A hard link moves the time of change of the base's file. The caller takes that time over, so that
        # the file is not read again for it.
        before = {path: identity_at(path) for path in linked if wanted == "hard"}
        if wanted != "copy":
            refused = self.place.link(self.plan.files, sources, wanted or "reflink")
            # Without --link, reflinks are only an attempt: falling back to copies is worth no note.
            if refused and wanted:
                n_files, why = len(refused), next(iter(refused.values()))
                sentence = f"{_LINKS[wanted]} are not supported here ({why}); copied {counted(n_files, 'file')} instead"
                self._notes.append(note("link", self.prepared.out, sentence))
        self.place.begin(self.plan.files, self._merge, self._records, changed_times(self.inputs))
        for name in self._unfinished.full:
            self.place.finish_file(name)
        return [(path, identity, identity_at(path)) for path, identity in before.items()]

    def add(self, records: Sequence[TensorRecord]) -> None:
        """Record tensors that workers have written, in the journal and here.

        Raises:
            WriteError: the journal cannot be written.
        """
        self.place.note(records)
        # The journal first: an interrupt in between loses no tensor that is written.
        self._records += records
        for name in self._unfinished.without(records):
            self.place.finish_file(name)

    def finish(self, watch: Heard) -> Made:
        """Seal, verify and publish the filled output.

        Whatever is wrong with this output becomes the `error` of the result: the other outputs of the run are not
        affected. Its staging is kept or cleared, as the error demands.

        Raises:
            BaseException: the run is to end: it was interrupted, or its observer failed.
        """
        if self.prepared.part is not None:
            return self._released(self.prepared.part)
        error = None
        try:
            with translate_out_of_memory("writing the output"):
                self._finish(watch)
        except Exception as exc:
            if exc is watch.failure:  # the caller's own
                raise
            self.place.abort(exc)
            error = exc
        clock = self.clock
        copied = self._store_copied({file.name for file in self.plan.files})
        return Made(
            tuple(self._notes),
            "",
            self._verdict,
            self._survival(),
            clock.seconds,
            clock.busy_seconds,
            copied,
            "" if error else self.place.seen_at,
            self.workers,
            error,
        )

    def _released(self, part: Part) -> Made:
        """Leave the place to the other processes that share the output, and return what this one has made."""
        self.place.release()
        names = {file.name for piece in part.share(self._pieces()) for file in piece.files}
        nbytes = sum(file.nbytes for file in self.plan.files if file.name in names)
        words = f"{part} ({len(names)} of {counted(len(self.plan.files), 'file')}, {size_text(nbytes)})"
        return Made(
            tuple(self._notes),
            words,
            seconds=self.clock.seconds,
            busy_seconds=self.clock.busy_seconds,
            workers=self.workers,
            store_copied_bytes=self._store_copied(names),
        )

    def _store_copied(self, files: Collection[str]) -> int:
        """Return the bytes of the tensors of some files that the store has copied by itself."""
        # Such a tensor was not read: what is known of it is the checksum of its file.
        own = [record for record in self._records if record.file in files]
        return sum(record.nbytes for record in own if is_of_file(record.digest))

    def _file_of(self, name: str) -> str:
        """Return the text that names a weight file of the output."""
        return place_of(self.place.root, self.place.weights, name)

    def _survival(self) -> dict[str, Survival]:
        return {record.name: record.survival for record in self._records if record.survival}

    def _finish(self, watch: Observer) -> None:
        """Seal, verify and publish.

        Raises:
            ChangedError: an input has changed.
            VerifyError: the verification failed.
            PlanError: the base has NaN, the output has lost the change, or there are warnings and --strict makes them errors.
            WriteError: the disk refused something.
        """
        request = self.prepared.request
        # One stat per file, and a changed input explains what follows better than a failed verification.
        check_names(self.inputs)
        with self.clock("seal"), watching(self.inputs) as seen:
            sealed = seal(self.place, self.plan, self._records, provenance_of(self.prepared.planned))
        with self.clock("seal"):
            self.inputs = seen.inputs()
            # Side files were read in planning and are copied now: both readings must be of the same bytes.
            check_copied(self.inputs, self.plan, self.place.root)
            used = used_by(self.plan.steps, self._records)
            check(self.inputs, used, all_bytes=request.verify == "full")
            check_base(self._records, self.plan)
        if request.verify == "none":
            self._check_finite()
            self._flush(watch)
        else:
            self._verify(request.verify, sealed, used, watch)
            # Verifying takes a while: ask once more.
            check_names(self.inputs)
        survival = self._survival()
        check_effect(self.prepared.planned, self._file_of, survival)
        self._notes += (*self._verdict.notes, *survival_issues(survival, self.plan))
        check_loss(survival, self.plan, is_allowed=request.allow_loss)
        check_strict(self._notes, strict=request.strict)
        # Last of all: an output that failed a check never has its name.
        with self.clock("publish"):
            watch.phase("publishing", 0)
            self.place.commit()

    def _check_finite(self) -> None:
        """Check what the merge knows of its values by itself, where nothing is verified.

        Raises:
            PlanError: some are NaN or infinite.
        """
        if issues := list(finite(Evidence(self.plan, self.place.root, tuple(self._records), "sample"))):
            raise PlanError(issues)

    def _verify(
        self,
        level: Literal["sample", "full"],
        sealed: Mapping[str, str],
        used: Mapping[Place, str],
        watch: Observer,
        *,
        is_last: bool = False,
    ) -> None:
        """Verify the staged files, and wait until the disk has them.

        A filesystem may set the time of a change late, or something else writes there. So what changed meanwhile is verified in full.

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
        before, has_torch = self.place.listing(), needs_torch(self.plan.steps)
        n_threads = min(self.prepared.budget.n_workers, usable_cores())
        with self.clock("verify"), reckoners(n_threads, has_torch=has_torch) as crew:
            watch.phase("verifying", 0)
            self._verdict = check_output(
                self.plan,
                self.place.root,
                self._records,
                level,
                sealed,
                self._elsewhere(before),
                crew,
            )
        if not self._verdict.ok:
            check_names(self.inputs)
            check(self.inputs, used)  # an input that changes meanwhile looks like a wrong output
            raise VerifyError(self._verdict)
        self._flush(watch)
        after = self.place.listing()
        if after == before:
            return
        # seen[:2] is (inode, size). Another inode or size is another file, not a time that was set late.
        if is_last or {name: seen[:2] for name, seen in after.items()} != {
            name: seen[:2] for name, seen in before.items()
        }:
            hint = "run again while no other program writes to it"
            raise WriteError(f"{self.place.root}: changed while it was being verified", hint=hint)
        # Only times have moved. Sampled blocks would not show a write elsewhere, so everything is read.
        self._verify("full", sealed, used, watch, is_last=True)

    def _elsewhere(self, listing: Listing) -> Elsewhere:
        """Return where the weight files are, with what is there now."""
        if not self.place.weights:
            return HERE
        return Elsewhere(self.place.weights, frozenset(listing), self.place.compared())

    def _flush(self, watch: Observer) -> None:
        with self.clock("flush"):
            watch.phase("flushing", 0)
            self.place.flush()

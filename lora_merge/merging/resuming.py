"""Resuming an interrupted run: is it the same merge, which tensors are whole, and were they made of these inputs?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_merge import executors
from lora_merge._version import __version__
from lora_merge.checks.projecting import read_once
from lora_merge.core.plan import Copy, Merge, Step
from lora_merge.core.tensor import TensorRecord, TensorRef
from lora_merge.core.work import Plain, largest_first
from lora_merge.formats.safetensors import tensor_digest
from lora_merge.merging.by_file import file_pieces
from lora_merge.merging.unchanged_inputs import changed_times, sources_of
from lora_merge.merging.worker import needs_torch
from lora_merge.native.library import library
from lora_merge.runtime.torch_threads import one_torch_thread
from lora_merge.storage.digests import digest_text, new_digest
from lora_merge.storage.sources import is_local

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from lora_merge.core.identity import Inputs
    from lora_merge.core.plan import MergePlan
    from lora_merge.core.report import Observer
    from lora_merge.storage.destination import Destination, Left


def fingerprint(
    plan: MergePlan, known: Sequence[object], digests: Sequence[str], options: Mapping[str, object]
) -> str:
    """Return a digest that is equal for two runs exactly when one may resume the other.

    That is the plan, its inputs as they are, the options, and the versions that decide how it is carried out.

    Args:
        plan: of the merge.
        known: of the files that it is made from (`unchanged_inputs.lasting` or `portable`).
        digests: of the adapters.
        options: that shape the output.
    """
    from importlib import metadata

    digest = new_digest()
    # Compiled loops sum in another order than torch.
    versions = (__version__, metadata.version("torch"), library() is not None)
    # surrogatepass: paths that are not UTF-8 hold lone surrogates.
    for part in (plan, known, digests, sorted(options.items()), versions):
        digest.update(repr(part).encode("utf-8", "surrogatepass"))
    return digest_text(digest)


def finished(
    plan: MergePlan,
    inputs: Inputs,
    place: Destination,
    left: Left,
    n_workers: int,
    watch: Observer,
    *,
    is_checked: bool,
) -> list[TensorRecord] | None:
    """Return the records of the tensors that an interrupted run has finished; None where it was another merge.

    What the journal lists counts if it is still there, to the byte, and if it was made of the bytes that its input has
    now; those are read where the input's times cannot tell. What else is staged is removed.

    A journal can be edited so that it fits wrong tensors. So copies are compared with their sources, and rows of merged tensors
    projected again; what differs is written again. A source on another machine is not read for that.

    Args:
        plan: of this run.
        inputs: of this run.
        place: of the output; it keeps the files that count.
        left: what the other one left there.
        n_workers: threads to read with.
        watch: hears of the bytes.
        is_checked: False where the output is not to be verified: then the digests in the journal are enough.
    """
    # Also when it was another merge: then nothing of it is kept.
    kept = place.keep(plan.files, [record.file for record in left.records or ()])
    if left.records is None:
        return None
    if place.files is not None:
        return _in_whole_files(plan, left.records, kept)
    before, now = left.changed, changed_times(inputs)
    # An input whose time of change is what the interrupted run noted has not changed since. The others are
    # read again, for each tensor that was made from them.
    same = frozenset(path for path, time in now.items() if before.get(path) == time)
    slots = {slot.name: slot for step in plan.steps for slot in step.slots}
    makers = {slot.name: step for step in plan.steps for slot in step.slots}
    # A journal may list a tensor twice, where a resumed run wrote it again: the last record counts.
    there = [
        _Written(
            record,
            replace(slots[record.name], file=str(place.root / record.file)),
            makers[record.name],
            is_doubtful=not same.issuperset(ref.file for ref in makers[record.name].reads.values()),
            is_checked=is_checked,
        )
        for record in {record.name: record for record in left.records}.values()
        if record.file in kept and _is_of(record, slots.get(record.name))
    ]
    watch.phase("checking", sum(piece.nbytes for piece in there))
    found = []
    has_torch = is_checked and needs_torch(makers[one.record.name] for one in there)
    with one_torch_thread(has_torch=has_torch):
        for piece, record in executors.pick(n_workers)(Plain(_look_at), largest_first(there), n_workers):
            watch.advance(piece.nbytes)
            if record is not None:
                found.append(record)
    return _whole_steps(plan, found)


def _in_whole_files(
    plan: MergePlan, records: Sequence[TensorRecord], kept: Collection[str]
) -> list[TensorRecord]:
    """Return the records of files that stay. The storage has said that each is the version that was written; the
    fingerprint of the run has the versions of its inputs.
    """
    again = {file.name for piece in file_pieces(plan, kept) for file in piece.files}
    return [record for record in records if record.file in kept and record.file not in again]


def _whole_steps(plan: MergePlan, records: Sequence[TensorRecord]) -> list[TensorRecord]:
    """Return the records of complete steps. A step with a part missing is redone whole."""
    there = {record.name for record in records}
    done = {
        slot.name
        for step in plan.steps
        if there.issuperset(slot.name for slot in step.slots)
        for slot in step.slots
    }
    return [record for record in records if record.name in done]


@dataclass(frozen=True, slots=True)
class _Written:
    """A tensor that a journal lists, and where it should be in the staged files."""

    record: TensorRecord
    ref: TensorRef
    step: Step
    """The step that made it."""

    is_doubtful: bool
    """True where a source of it may have changed since."""

    is_checked: bool
    """True where it is compared with its sources."""

    @property
    def nbytes(self) -> int:
        return self.ref.nbytes

    def found(self) -> TensorRecord | None:
        """Read the tensor and what it was made of; return its record, or None where it has to be written again."""
        op = self.step.op
        # What is far away was compared while it passed; it is not fetched twice.
        is_compared = self.is_checked and all(is_local(ref.file) for ref in self.step.reads.values())
        is_asked = self.is_doubtful or (is_compared and isinstance(op, Copy))
        sources = sources_of(self.step, self.record) if is_asked else []
        if not all(tensor_digest(ref) == digest for ref, digest in sources):
            return None
        if is_compared and isinstance(op, Merge):
            return self._merged()
        # A crash of the machine may have lost what the journal lists, so every tensor is read.
        return self.record if tensor_digest(self.ref) == self.record.digest else None

    def _merged(self) -> TensorRecord | None:
        """Return the record of a merged tensor with what one reading tells of it now; None if that is worse than what is
        recorded.
        """
        record = self.record
        role = next(role for role, slot in self.step.writes.items() if slot.name == record.name)
        digest, finite, projection = read_once(self.step, role, self.ref)
        suspects = projection.suspects() if projection is not None else None
        # Rows that were suspects already are recomputed when the output is verified.
        is_as_recorded = (
            digest == record.digest
            and finite >= record.finite
            and {*(suspects or ())} <= {*(record.suspects or ())}
        )
        return replace(record, suspects=suspects) if is_as_recorded else None


def _look_at(piece: _Written) -> tuple[_Written, TensorRecord | None]:
    return piece, piece.found()


def _is_of(record: TensorRecord, slot: TensorRef | None) -> bool:
    return slot is not None and (record.file, record.nbytes) == (slot.file, slot.nbytes)

"""Going on where an interrupted run stopped: is it the same merge, what of it is there, and was it made of these inputs?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_merge import executors
from lora_merge._version import __version__
from lora_merge.core.plan import Step
from lora_merge.core.tensor import TensorRecord, TensorRef
from lora_merge.core.work import Plain, largest_first
from lora_merge.formats.safetensors import tensor_digest
from lora_merge.merging.unchanged_inputs import changed_times, lasting, sources_of
from lora_merge.storage.digests import digest_text, new_digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_merge.core.identity import Inputs
    from lora_merge.core.plan import MergePlan
    from lora_merge.core.report import Observer
    from lora_merge.storage.destination import Destination, Left


def fingerprint(
    plan: MergePlan, inputs: Inputs, digests: Sequence[str], options: Mapping[str, object]
) -> str:
    """Return what two runs must have in common for one to go on where the other stopped.

    That is the plan, its inputs as they are, the options, and the versions that decide how it is carried out.

    Args:
        plan: of the merge.
        inputs: that it was made from.
        digests: of the adapters.
        options: that shape the output.
    """
    from importlib import metadata

    digest = new_digest()
    versions = (__version__, metadata.version("torch"))
    for part in (plan, lasting(inputs), digests, sorted(options.items()), versions):
        digest.update(repr(part).encode("utf-8", "surrogatepass"))
    return digest_text(digest)


def finished(
    plan: MergePlan,
    inputs: Inputs,
    place: Destination,
    left: Left,
    n_workers: int,
    watch: Observer,
) -> list[TensorRecord] | None:
    """Return the records of what an interrupted run has written, or None where it was another merge.

    What the journal lists counts if it is still there, to the byte, and if it was made of the bytes that its input has
    now; those are read where the input's times cannot tell. What else is staged is removed.

    Args:
        plan: of this run.
        inputs: of this run.
        place: of the output; it keeps the files that count.
        left: what the other one left there.
        n_workers: threads to read with.
        watch: hears of the bytes.
    """
    kept = place.keep(plan.files, [record.file for record in left.records or ()])
    if left.records is None:
        return None
    slots = {slot.name: slot for step in plan.steps for slot in step.slots}
    before, now = left.changed, changed_times(inputs)
    same = frozenset(path for path, time in now.items() if before.get(path) == time)
    doubtful = {
        slot.name: step
        for step in plan.steps
        if not same.issuperset(ref.file for ref in step.reads.values())
        for slot in step.slots
    }
    there = [
        _Written(
            record,
            replace(slots[record.name], file=str(place.root / record.file)),
            doubtful.get(record.name),
        )
        for record in {record.name: record for record in left.records}.values()
        if record.file in kept and _is_of(record, slots.get(record.name))
    ]
    watch.phase("checking", sum(piece.nbytes for piece in there))
    found = []
    for piece, is_whole in executors.pick(n_workers)(Plain(_look_at), largest_first(there), n_workers):
        watch.advance(piece.nbytes)
        if is_whole:
            found.append(piece.record)
    return _whole_steps(plan, found)


def _whole_steps(plan: MergePlan, records: Sequence[TensorRecord]) -> list[TensorRecord]:
    """Return the records of steps that are done; one of which a part is missing is done again as a whole."""
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
    """A tensor that a journal lists, and the place where it should be."""

    record: TensorRecord
    ref: TensorRef
    step: Step | None
    """What made it, where a source of it may have other bytes now."""

    @property
    def nbytes(self) -> int:
        """Return its size."""
        return self.ref.nbytes

    def is_whole(self) -> bool:
        """Return True when it has the bytes that were written, and its source those that it was made of."""
        if tensor_digest(self.ref) != self.record.digest:
            return False
        if self.step is None:
            return True
        return all(tensor_digest(ref) == digest for ref, digest in sources_of(self.step, self.record))


def _look_at(piece: _Written) -> tuple[_Written, bool]:
    return piece, piece.is_whole()


def _is_of(record: TensorRecord, slot: TensorRef | None) -> bool:
    return slot is not None and (record.file, record.nbytes) == (slot.file, slot.nbytes)

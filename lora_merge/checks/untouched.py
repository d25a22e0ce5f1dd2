"""Do the bytes on the disk have the digests that writing recorded?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from lora_merge.core.plan import Copy
from lora_merge.core.report import error
from lora_merge.formats.safetensors import tensor_digest
from lora_merge.storage.ahead import read_ahead
from lora_merge.storage.digests import file_digest, is_of_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.checks.evidence import Evidence
    from lora_merge.core.plan import Step  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.core.report import Issue
    from lora_merge.core.tensor import TensorRecord, TensorRef  # noqa: TC004 - the same

WHOLE_BYTES = 256 << 20
"""Up to this many bytes of merged tensors together, all of them are read back at every level."""


def untouched(evidence: Evidence) -> Iterator[Issue]:
    """Yield an issue for each tensor or file whose bytes on the disk are not those that were recorded.

    A copy's record is the digest of its *source*, so equality means byte-identical to the base. Merged tensors are
    read back too: all of them at level ``full`` or where they are small together, else some blocks of each. Files
    around the weights are compared with what was meant to be written.
    """
    recorded = {record.name: record for record in evidence.records}
    merged_bytes = sum(step.nbytes for step in evidence.plan.steps if not isinstance(step.op, Copy))
    is_whole = evidence.level == "full" or merged_bytes <= WHOLE_BYTES
    seen = [
        _Seen(step, replace(slot, file=evidence.file_of(slot.file)), recorded.get(slot.name))
        for step in evidence.plan.steps
        for slot in step.slots
        if evidence.level == "full" or slot.file not in evidence.elsewhere.compared
    ]
    # Blocks are small and apart, and merged tiles went past the page cache: each alone would wait for the disk.
    ahead = seen if is_whole else read_ahead(seen, _Seen.ranges)
    yield from evidence.crew.each(partial(_compared, evidence, is_whole=is_whole), ahead)
    yield from _sealed(evidence)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A tensor of the output that is read back: where it is, and what is recorded of it."""

    step: Step
    ref: TensorRef
    record: TensorRecord | None

    @property
    def is_copy(self) -> bool:
        return isinstance(self.step.op, Copy)

    def ranges(self) -> Iterator[tuple[str, int, int]]:
        """Yield the file, the first byte and the size of each block; of a copy nothing, which is read whole."""
        for at, nbytes, _ in self.record.blocks if self.record is not None and not self.is_copy else ():
            yield self.ref.file, self.ref.start + at, nbytes


def _compared(evidence: Evidence, one: _Seen, *, is_whole: bool) -> Iterator[Issue]:
    """Yield an issue if a tensor's bytes are not those that are recorded."""
    record, ref, op = one.record, one.ref, one.step.op
    if isinstance(op, Copy) and record is not None and is_of_file(record.digest):
        # The store copied it, and nobody has read it so far.
        record = replace(record, digest=evidence.digest(op.source))
    if one.is_copy or (is_whole and record is not None and record.digest):
        found, wanted = evidence.digest(ref), record.digest if record else None
        if found != wanted:
            what = "differs from the base" if one.is_copy else "has changed since it was written"
            yield error("wrong-digest", ref.name, f"{what}: digest {found}, expected {wanted}")
    # Digests of one tile in eight were taken while each was in the cache.
    elif record is not None:
        yield from _blocks(ref, record)


def _blocks(ref: TensorRef, record: TensorRecord) -> Iterator[Issue]:
    """Yield an issue for the first block of a tensor whose digest is not the recorded one."""
    for at, nbytes, wanted in record.blocks:
        found = tensor_digest(replace(ref, start=ref.start + at, nbytes=nbytes))
        if found != wanted:
            where = f"bytes {at} to {at + nbytes}"
            yield error(
                "wrong-digest",
                ref.name,
                f"{where} have changed since they were written: digest {found}, expected {wanted}",
            )
            return


def _sealed(evidence: Evidence) -> Iterator[Issue]:
    """Yield an issue for each file around the weights that does not hold what was meant to be written."""
    for name, wanted in evidence.sealed.items():
        found = file_digest(evidence.root / name)
        if found != wanted:
            yield error(
                "wrong-digest", name, f"has changed since it was written: digest {found}, expected {wanted}"
            )

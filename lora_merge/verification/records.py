"""What the checks of a merge need of its tensors, found again from the files of an output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_merge.checks.projecting import has_floats, suspects_of
from lora_merge.core.plan import Copy
from lora_merge.core.tensor import TensorRecord
from lora_merge.formats.safetensors import is_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping  # noqa: TC004 - a field's type, never evaluated

    from lora_merge.core.plan import Step
    from lora_merge.core.tensor import Survival, TensorRef  # noqa: TC004 - the same
    from lora_merge.formats.written_checkpoint import Output  # noqa: TC004 - the same
    from lora_merge.verification.looking import Seen  # noqa: TC004 - the same

    Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Records:
    """Finds records of tensors. Several threads may ask at once."""

    output: Output
    digest: Callable[[TensorRef], str]

    kept: Callable[[str], Survival | None]
    """Returns what the manifest says of the adapters' effect on a tensor."""

    is_projecting: bool
    """False where all rows are recomputed anyway."""

    seen: Mapping[str, Seen]
    """What was seen of merged tensors before, by the name of the step."""

    def of(self, step: Step) -> Iterator[TensorRecord]:
        """Yield the record of each tensor of a step: a copy's digest, finiteness, suspect rows. Digests of merged tensors were
        compared with the manifest already.

        Raises:
            CheckpointError: a file cannot be read.
        """
        if isinstance(step.op, Copy):
            (slot,) = step.slots
            yield TensorRecord(slot.name, slot.file, slot.nbytes, self.digest(step.op.source), finite=True)
            return
        before = self.seen.get(step.name)
        if before is not None:
            suspects = before.suspects() if self.is_projecting else None
            yield self._record(step.main, suspects, finite=before.finite)
            return
        here = {
            role: replace(slot, file=self.output.file_of(slot.file)) for role, slot in step.writes.items()
        }
        suspects = suspects_of(step, here) if self.is_projecting else None
        for role, slot in step.writes.items():
            finite = not has_floats(step.op, role, slot.dtype) or is_finite(here[role])
            yield self._record(slot, suspects, finite=finite)

    def _record(self, slot: TensorRef, suspects: Rows | None, *, finite: bool) -> TensorRecord:
        return TensorRecord(
            slot.name, slot.file, slot.nbytes, "", finite, self.kept(slot.name), suspects=suspects
        )

"""Runs of adjacent copies, each one piece of work; and output files that consist of copies only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.core.plan import Copy, Step

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_merge.core.plan import MergePlan
    from lora_merge.core.tensor import TensorRef

RUN_BYTES = 64 << 20
"""The most bytes of a run of several tensors, so that work is shared out evenly among workers."""

STORE_RUN_BYTES = 1 << 40
"""The same where the store copies by itself: it cuts a run as it needs to."""

LEAST_STORE_BYTES = 5 << 20
"""The fewest bytes that a store is asked to copy: S3 makes no smaller part of a file."""


@dataclass(frozen=True, slots=True)
class CopyRun:
    """Copies that are adjacent in the source file and in the output file, in the same order: one read and one write
    range.
    """

    steps: tuple[Step, ...]

    @property
    def sources(self) -> tuple[TensorRef, ...]:
        """The stored tensors that are copied, in order."""
        return tuple(_source(step) for step in self.steps)

    @property
    def slots(self) -> tuple[TensorRef, ...]:
        """Their places in the output, in order."""
        return tuple(slot for step in self.steps for slot in step.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(step.nbytes for step in self.steps)


def copy_runs(steps: Iterable[Step], most_bytes: int = RUN_BYTES) -> list[CopyRun]:
    """Group copies into runs; the order stays as it is.

    Args:
        steps: copies, in the order of the output's bytes.
        most_bytes: a tensor that would make a run longer begins the next one.
    """
    found: list[list[Step]] = []
    room = 0
    for step in steps:
        if not found or step.nbytes > room or not _follows(found[-1][-1], step):
            found.append([])
            # A tensor larger than `most_bytes` is a run by itself.
            room = max(most_bytes, step.nbytes)
        found[-1].append(step)
        room -= step.nbytes
    return [CopyRun(tuple(group)) for group in found]


def whole_copies(plan: MergePlan) -> dict[str, str]:
    """Return output file → base file, for output files whose tensors are all copies from that one file, at the same
    offsets.

    Such a file may be a link of the base's. The two headers are compared later, when the files are opened.
    """
    sources: dict[str, set[str]] = {file.name: set() for file in plan.files}
    for step in plan.steps:
        for slot in step.slots:
            # At another offset it could not be one file with the base's.
            is_same = isinstance(step.op, Copy) and step.op.source.start == slot.start
            sources[slot.file].add(_source(step).file if is_same else "")
    return {name: next(iter(found)) for name, found in sources.items() if len(found) == 1 and "" not in found}


def _follows(before: Step, step: Step) -> bool:
    """Return True when a copy begins where another one ends, in the source and in the output."""
    return _touch(_source(before), _source(step)) and _touch(before.slots[-1], step.main)


def _touch(before: TensorRef, ref: TensorRef) -> bool:
    return before.file == ref.file and before.end == ref.start


def _source(step: Step) -> TensorRef:
    assert isinstance(step.op, Copy)
    return step.op.source

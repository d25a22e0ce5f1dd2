"""Copies that lie together: neighbours, which are one piece of work, and files of nothing but copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.core.plan import Copy, Step

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_merge.core.plan import MergePlan
    from lora_merge.core.tensor import TensorRef

STRETCH_BYTES = 64 << 20
"""Of a stretch of several tensors, at most, so that the work is shared out evenly."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Copies that lie one after the other, in their source as in their output."""

    steps: tuple[Step, ...]

    @property
    def sources(self) -> tuple[TensorRef, ...]:
        """Return what is copied, in order."""
        return tuple(_source(step) for step in self.steps)

    @property
    def slots(self) -> tuple[TensorRef, ...]:
        """Return where it is copied to, in order."""
        return tuple(slot for step in self.steps for slot in step.slots)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all its tensors."""
        return sum(step.nbytes for step in self.steps)


def stretches(steps: Iterable[Step], most_bytes: int = STRETCH_BYTES) -> list[Stretch]:
    """Return copies in stretches, in the order they come in.

    Args:
        steps: copies, in the order of the output's bytes.
        most_bytes: a tensor that would make a stretch longer begins the next one.
    """
    found: list[list[Step]] = []
    room = 0
    for step in steps:
        if not found or step.nbytes > room or not _follows(found[-1][-1], step):
            found.append([])
            room = max(most_bytes, step.nbytes)
        found[-1].append(step)
        room -= step.nbytes
    return [Stretch(tuple(group)) for group in found]


def whole_copies(plan: MergePlan) -> dict[str, str]:
    """Return the output's files that may be the base's own: name → the file that all of its tensors come from.

    All tensors of such a file are copies, and lie in it as they do in the base's. Whether the headers are the same
    text is for whoever opens them to see.
    """
    sources: dict[str, set[str]] = {file.name: set() for file in plan.files}
    for step in plan.steps:
        for slot in step.slots:
            is_same = isinstance(step.op, Copy) and step.op.source.start == slot.start
            sources[slot.file].add(_source(step).file if is_same else "")
    return {name: next(iter(found)) for name, found in sources.items() if len(found) == 1 and "" not in found}


def _follows(before: Step, step: Step) -> bool:
    """Return True where one copy begins where another ends, on both sides."""
    return _touch(_source(before), _source(step)) and _touch(before.slots[-1], step.main)


def _touch(before: TensorRef, ref: TensorRef) -> bool:
    return before.file == ref.file and before.end == ref.start


def _source(step: Step) -> TensorRef:
    assert isinstance(step.op, Copy)
    return step.op.source

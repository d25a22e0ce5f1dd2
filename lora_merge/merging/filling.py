"""Steps that are left → pieces of work in the order of the files that they fill; and which files are full by now."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lora_merge.core.plan import Copy, Merge
from lora_merge.core.work import Piece
from lora_merge.merging.worker import alike
from lora_merge.storage.copy_runs import copy_runs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lora_merge.core.plan import MergePlan, Step
    from lora_merge.core.tensor import TensorRecord
    from lora_merge.storage.copy_runs import CopyRun

Left = tuple[int, "Step"]
"""The number of an output, and a step that is still to be done for it."""


class Order:
    """The order of the work: by output file, so that files become full one after the other.

    Args:
        plans: of each output, by its number.
    """

    def __init__(self, plans: Sequence[MergePlan]) -> None:
        self._places = {
            (number, file.name): n for number, plan in enumerate(plans) for n, file in enumerate(plan.files)
        }

    def of_file(self, piece: Piece) -> int:
        """Return the index of the first file that a piece fills, in the order of its output's plan."""
        return min(
            self._places[number, slot.file]
            for number, steps in piece.wanted
            for step in steps
            for slot in step.slots
        )

    def of_merge(self, piece: Piece) -> tuple[int, int]:
        """Return a sort key: the index of the file, then the larger pieces first."""
        # A large piece begun last would keep all other workers waiting for one.
        return self.of_file(piece), -piece.nbytes


def copies(left: Iterable[Left], order: Order) -> list[Piece]:
    """Return the copies among some steps as pieces, each one run of adjacent tensors. Outputs that copy the same
    bytes share a piece, so the bytes are read once.
    """
    own: dict[int, list[Step]] = {}
    for number, step in left:
        if isinstance(step.op, Copy):
            own.setdefault(number, []).append(step)
    found: dict[object, list[tuple[int, tuple[Step, ...]]]] = {}
    for number, steps in own.items():
        # Runs are formed for each output alone: which tensors are adjacent depends on its files.
        for run in copy_runs(steps):
            found.setdefault(_source(run), []).append((number, run.steps))
    return sorted((Piece(tuple(wanted)) for wanted in found.values()), key=order.of_file)


def _source(run: CopyRun) -> object:
    return tuple((ref.file, ref.start, ref.nbytes) for ref in run.sources)


def merges(left: Iterable[Left], order: Order) -> list[Piece]:
    """Return the merges among some steps as pieces. Outputs that merge the same source alike share a piece
    (`worker.alike`), so it is read and decoded once.
    """
    found: dict[object, list[tuple[int, tuple[Step, ...]]]] = {}
    for number, step in left:
        if isinstance(step.op, Merge):
            found.setdefault(alike(step.op), []).append((number, (step,)))
    return sorted((Piece(tuple(wanted)) for wanted in found.values()), key=order.of_merge)


class Unfinished:
    """The files of one output that are not full yet.

    Args:
        plan: of the output.
        records: of what is written already.
    """

    def __init__(self, plan: MergePlan, records: Iterable[TensorRecord]) -> None:
        self._left: Counter[str] = Counter({file.name: len(file.slots) for file in plan.files})
        self.full = tuple(name for name, n in self._left.items() if not n)
        """Names of the files that were full from the start: those without tensors, and those that ``records`` fill.
        """

        self.full += tuple(self.without(records))

    def without(self, records: Iterable[TensorRecord]) -> list[str]:
        """Count tensors as written, once each; return the names of the files that became full."""
        full = []
        for record in records:
            self._left[record.file] -= 1
            if not self._left[record.file]:
                full.append(record.file)
        return full


def by_output(records: Iterable[tuple[int, TensorRecord]]) -> Mapping[int, list[TensorRecord]]:
    """Return the records of each output, by the output's number."""
    found: dict[int, list[TensorRecord]] = {}
    for number, record in records:
        found.setdefault(number, []).append(record)
    return found

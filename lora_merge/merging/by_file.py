"""Steps that are left → whole output files as work, for storages that take a file from its first byte to its last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.plan import Copy
from lora_merge.core.work import Piece, largest_first
from lora_merge.merging.worker import FilePiece
from lora_merge.storage.copy_runs import RUN_BYTES, copy_runs
from lora_merge.storage.in_order import HELD_BYTES
from lora_merge.storage.objects.parts import PARTS_UNDER_WAY, part_bytes
from lora_merge.storage.ranged import BLOCK_BYTES, BLOCKS_AHEAD

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from lora_merge.core.plan import MergePlan, Step
    from lora_merge.core.shards import OutputFile
    from lora_merge.core.tensor import TensorRef


def file_pieces(
    plan: MergePlan, done: Collection[str] = (), most_run_bytes: int = RUN_BYTES
) -> list[FilePiece]:
    """Return the files of a plan as pieces of work, the largest first. Each has all steps that fill its files.

    A file is a piece by itself, except where a step fills slots of several files: they are one piece.

    Args:
        plan: of the output.
        done: names of the files that are there already. A piece with another file is made whole.
        most_run_bytes: of copies that are one read (`copy_runs`).
    """
    together = _together(plan)
    files: dict[str, list[OutputFile]] = {}
    for file in plan.files:
        files.setdefault(together[file.name], []).append(file)
    steps: dict[str, list[Step]] = {name: [] for name in files}
    for step in plan.steps:
        steps[together[step.main.file]].append(step)
    return largest_first(
        FilePiece(tuple(own), tuple(_in_order(own, steps[name], most_run_bytes)))
        for name, own in files.items()
        if not {file.name for file in own}.issubset(done)
    )


def _together(plan: MergePlan) -> Mapping[str, str]:
    """Return for each file the first file of those that are made together with it."""
    first = {file.name: file.name for file in plan.files}
    for step in plan.steps:
        found = {first[slot.file] for slot in step.slots}
        if len(found) > 1:
            one = min(found)
            first = {name: one if root in found else root for name, root in first.items()}
    return first


def _in_order(files: Sequence[OutputFile], steps: Sequence[Step], most_run_bytes: int) -> list[Piece]:
    """Return steps as pieces in the order of the first slot of each, so that bytes wait as little as they can."""
    place = {slot.name: n for n, slot in enumerate(slot for file in files for slot in file.slots)}

    def first(step: Step) -> int:
        return min(place[slot.name] for slot in step.slots)

    copies = sorted((step for step in steps if isinstance(step.op, Copy)), key=first)
    groups = [run.steps for run in copy_runs(copies, most_run_bytes)]
    groups += [(step,) for step in steps if not isinstance(step.op, Copy)]
    return [Piece(((0, group),)) for group in sorted(groups, key=lambda group: first(group[0]))]


def held_bytes(piece: FilePiece) -> int:
    """Return the most bytes of a piece that wait for bytes before them (`storage.in_order`).

    A slot counts as whole from the moment that its step begins: an upper bound.
    """
    left = {slot.name for file in piece.files for slot in file.slots}
    order = {file.name: [slot for slot in file.slots if slot.nbytes] for file in piece.files}
    at, waiting, most = dict.fromkeys(order, 0), 0, 0
    for one in piece.pieces:
        ((_, steps),) = one.wanted
        slots = [slot for step in steps for slot in step.slots if slot.nbytes]
        left -= {slot.name for slot in slots}
        waiting += sum(slot.nbytes for slot in slots)
        # The bytes of a run of copies come in their order. Of a merge, what is first in its file is passed on as it comes.
        is_copy = isinstance(steps[0].op, Copy)
        passed = slots if is_copy else [slot for slot in slots if slot in _firsts(order, at)]
        most = max(most, waiting - sum(slot.nbytes for slot in passed))
        for name, own in order.items():
            while at[name] < len(own) and own[at[name]].name not in left:
                waiting -= own[at[name]].nbytes
                at[name] += 1
    return most


def under_way_bytes(piece: FilePiece) -> int:
    """Return the bytes of a piece that are in memory at a time: parts that are being sent, blocks that are fetched ahead, and
    bytes that wait.
    """
    parts = sum((PARTS_UNDER_WAY + 1) * min(part_bytes(file.nbytes), file.nbytes) for file in piece.files)
    return parts + (BLOCKS_AHEAD + 1) * BLOCK_BYTES + min(held_bytes(piece), HELD_BYTES)


def _firsts(order: Mapping[str, Sequence[TensorRef]], at: Mapping[str, int]) -> list[TensorRef]:
    """Return the next slot of each file that is not full."""
    return [own[at[name]] for name, own in order.items() if at[name] < len(own)]

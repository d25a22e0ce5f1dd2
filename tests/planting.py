"""Faults that are planted in a merge, or in what it has staged, by standing in the way of the real code."""

from __future__ import annotations

import contextlib
import importlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.core.plan import Copy, Merge, MergePlan
from lora_merge.core.shards import header_bytes
from lora_merge.core.weight import WEIGHT

if TYPE_CHECKING:
    from pathlib import Path

merging: Any = importlib.import_module(
    "lora_merge.merging.worker.filling"
)  # `lora_merge.merge` itself is the verb
merger: Any = importlib.import_module("lora_merge.merging.worker.merger")
workbench: Any = importlib.import_module("lora_merge.merging.worker.workbench")
staged: Any = importlib.import_module("lora_merge.merging.staged")


@dataclass(frozen=True)
class Place:
    """Where a fault is planted: rows of one merged tensor."""

    name: str
    row: int
    other: int
    """Another row of the same tile."""

    column: int


def place_in(plan: MergePlan, seed: int, at_least: int = 2) -> Place:
    """Return a random place in a random merged tensor of a plan."""
    drawn = random.Random(seed)
    found = [(step.name, step.op) for step in plan.steps if isinstance(step.op, Merge)]
    name, op = drawn.choice([(name, op) for name, op in found if op.deltas and op.view.n_rows >= at_least])
    start, end = drawn.choice(op.tiles())
    row, other = drawn.sample(range(start, end), 2)
    return Place(name, row, other, drawn.randrange(op.view.columns))


Spoil = Callable[[Any, Any, int, int], None]
"""Rows as the merge made them, as they were before, and the places of the two rows in the tile."""


def _zero(values: Any, _: Any, row: int, __: int) -> None:
    values[row] = 0


def _rotate(values: Any, _: Any, row: int, __: int) -> None:
    values[row] = values[row].roll(1)


def _swap(values: Any, _: Any, row: int, other: int) -> None:
    values[[row, other]] = values[[other, row]]


def _twice(values: Any, before: Any, row: int, _: int) -> None:
    values[row] += values[row] - before[row]


def _never(values: Any, before: Any, row: int, _: int) -> None:
    values[row] = before[row]


def _zero_tile(values: Any, *_: Any) -> None:
    values.zero_()


def _rescale(values: Any, before: Any, *_: Any) -> None:
    values.copy_(before + 1.5 * (values - before))


IN_ROWS: dict[str, Spoil] = {
    "a row of zeros": _zero,
    "a row rotated by one": _rotate,
    "two rows swapped": _swap,
    "a row merged twice": _twice,
    "a row not merged": _never,
}

IN_TILES: dict[str, Spoil] = {"a tile of zeros": _zero_tile}

IN_TENSORS: dict[str, Spoil] = {"a module with half its scale too much": _rescale}

IN_MERGES = IN_ROWS | IN_TILES | IN_TENSORS


@contextlib.contextmanager
def in_merge(fault: str, place: Place, tensor: str) -> Iterator[None]:
    """Have the merge make a fault, in torch or in compiled code.

    Args:
        tensor: what the base calls the tensor of the place.
    """
    real = merging.change

    def is_there(start: int, end: int, op: Merge) -> bool:
        return op.source.name == tensor and (fault in IN_TENSORS or start <= place.row < end)

    def spoil(values: Any, before: Any, start: int) -> None:
        IN_MERGES[fault](values, before, place.row - start, place.other - start)

    def spoiled(values: Any, start: int, end: int, op: Merge, changers: Any) -> None:
        before = values.clone() if is_there(start, end, op) else None
        real(values, start, end, op, changers)
        # After compiled code, the first rows of a tile are changed once more: the two may not be among them.
        if before is not None and (fault not in IN_ROWS or max(place.row, place.other) < end):
            spoil(values, before, start)

    def added(rounded: Any, stored: Any, tile: Any, op: Merge) -> None:
        if is_there(tile.start, tile.end, op):
            values = rounded.float()
            spoil(values, stored.float(), tile.start)
            rounded.copy_(values)

    merging.change = spoiled
    try:
        with _after_adding(added):
            yield
    finally:
        merging.change = real


@contextlib.contextmanager
def one_unit_off(place: Place, tensor: str) -> Iterator[None]:
    """Have the merge write one element that is the next number up."""
    real, encode = merging.change, workbench.Frame.encode
    here = threading.local()  # each worker has a tile of its own

    def watched(values: Any, start: int, end: int, op: Merge, changers: Any) -> None:
        real(values, start, end, op, changers)
        is_here = op.source.name == tensor and start <= place.row < end
        here.rows = [place.row - start] if is_here else []

    def spoil(rounded: Any, row: int) -> None:
        import torch

        bits = rounded.view(torch.int32 if rounded.itemsize == 4 else torch.int16)
        bits[row, place.column] += 1

    def spoiled(self: Any, *codec: Any) -> None:
        encode(self, *codec)
        for row in getattr(here, "rows", ()):
            spoil(self.rounded[WEIGHT], row)

    def added(rounded: Any, stored: Any, tile: Any, op: Merge) -> None:
        del stored
        if op.source.name == tensor and tile.start <= place.row < tile.end:
            spoil(rounded, place.row - tile.start)

    merging.change, workbench.Frame.encode = watched, spoiled
    try:
        with _after_adding(added):
            yield
    finally:
        merging.change, workbench.Frame.encode = real, encode


@contextlib.contextmanager
def _after_adding(spoil: Callable[[Any, Any, Any, Merge], None]) -> Iterator[None]:
    """Call a function after each tile that compiled code has added, with torch's buffers or without torch.

    It gets bfloat16 ``[rows, columns]``, what is written and what was read, then the tile and what is done.
    """
    is_added, add, plainly = merging.Filling.is_added, workbench.Frame.add, merger.Merger._is_added
    here = threading.local()

    def noted(self: Any, n: int, *rest: Any) -> Any:
        here.tile, here.op = self.tiles[n], self.op
        return is_added(self, n, *rest)

    def spoiled(self: Any, stored: Any, product: Any) -> Any:
        is_done = add(self, stored, product)
        if is_done:
            spoil(self.rounded[WEIGHT].view(stored.shape), stored, here.tile, here.op)
        return is_done

    def plainly_spoiled(self: Any, output: Any, n: int, frame: Any, addend: Any) -> Any:
        is_done = plainly(self, output, n, frame, addend)
        if is_done:
            spoil(_bfloat16(frame.out), _bfloat16(frame.base), output.tiles[n], output.op)
        return is_done

    merging.Filling.is_added, workbench.Frame.add = noted, spoiled
    merger.Merger._is_added = plainly_spoiled
    try:
        yield
    finally:
        merging.Filling.is_added, workbench.Frame.add = is_added, add
        merger.Merger._is_added = plainly


def _bfloat16(halves: Any) -> Any:
    """Return a view of 16-bit integers as bfloat16."""
    import torch

    return torch.from_numpy(halves.view("int16")).view(torch.bfloat16)


ON_DISK = (
    "a merged tensor",
    "a copied tensor",
    "a header",
    "config.json",
    "README.md",
    "merge_manifest.json",
)


@contextlib.contextmanager
def bit_flipped(where: str, seed: int) -> Iterator[None]:
    """Flip one bit of what is staged, after it was written and before it is verified."""
    real = staged.check_output

    def spoiled(plan: MergePlan, root: Path, *rest: Any) -> Any:
        drawn = random.Random(seed)
        path, start, nbytes = _range(plan, root, where, drawn)
        at = start + drawn.randrange(nbytes)
        with path.open("r+b") as file:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1 << drawn.randrange(8)]))
        return real(plan, root, *rest)

    staged.check_output = spoiled
    try:
        yield
    finally:
        staged.check_output = real


def _range(plan: MergePlan, root: Path, where: str, drawn: random.Random) -> tuple[Path, int, int]:
    """Return the file of a fault, and its range of bytes."""
    if where == "a header":
        file = drawn.choice(plan.files)
        return root / file.name, 0, len(header_bytes(file))
    if where in {"a merged tensor", "a copied tensor"}:
        kind = Copy if where == "a copied tensor" else Merge
        slots = [step.main for step in plan.steps if isinstance(step.op, kind)]
        slot = drawn.choices(slots, [slot.nbytes for slot in slots])[0]
        return root / slot.file, slot.start, slot.nbytes
    return root / where, 0, (root / where).stat().st_size

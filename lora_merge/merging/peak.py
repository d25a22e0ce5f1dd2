"""The resident memory that a merge needs, by its plan: an estimate."""

from __future__ import annotations

import math
import sys
from heapq import nlargest
from typing import TYPE_CHECKING

from lora_merge.core.plan import Copy, Merge
from lora_merge.core.view import PANEL_ELEMENTS, TILE_ELEMENTS, Block, Spread
from lora_merge.merging.worker import needs_torch, tiles_of
from lora_merge.rounding.adapter import workspace_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.plan import MergePlan, Step

RUNTIME_BYTES = 260 << 20
"""Resident memory of the interpreter with torch loaded, before the first tile."""

PLAIN_RUNTIME_BYTES = 64 << 20
"""The same where torch is not needed."""

# Added only where a delta says `Facts.by_peft`.
PEFT_BYTES = 140 << 20
"""What transformers and PEFT add to that, where PEFT's own layers merge."""


def runtime_bytes(plan: MergePlan, *, on_gpu: bool = False) -> int:
    """Return the resident memory of the process before the first tile, in bytes."""
    # Planning may have loaded it, to look at a model without values; so may the program that calls.
    has_torch = on_gpu or "torch" in sys.modules or needs_torch(plan.steps)
    merges = (step.op for step in plan.steps if isinstance(step.op, Merge))
    by_peft = any(delta.facts.by_peft for op in merges for delta in op.deltas)
    return (RUNTIME_BYTES if has_torch else PLAIN_RUNTIME_BYTES) + by_peft * PEFT_BYTES


def peak_bytes(
    plan: MergePlan, n_workers: int, tile_elements: int | None = None, runtime: int | None = None
) -> int:
    """Return an estimate of the resident memory of the merge, in bytes.

    Args:
        plan: what is to be done.
        n_workers: at the same time.
        tile_elements: of a row tile.
        runtime: what `runtime_bytes` returned, if that was asked already.
    """
    # A worker keeps the buffers of its heaviest step. At worst the heaviest steps run at the same time.
    heaviest = nlargest(n_workers, (_step_bytes(step, tile_elements) for step in plan.steps))
    return (runtime_bytes(plan) if runtime is None else runtime) + sum(heaviest)


def _step_bytes(step: Step, tile_elements: int | None) -> int:
    """Return the memory that a worker needs for one step, in bytes: its tile in all its forms, and its factors."""
    match step.op:
        case Copy():
            return 4 * TILE_ELEMENTS
        case Merge() as op:
            tiles = tiles_of(op, tile_elements)
            elements = max((end - start for start, end in tiles), default=0) * op.view.columns
            factors = max((sum(map(_factor_bytes, found)) for found in _together(op, tiles)), default=0)
            panel = 8 * PANEL_ELEMENTS if op.reach == "columns" else 0
            # the raw tile, its float32 form, the delta, and the encoded tile
            each = 8 + 4 + 4 + 8
            if op.rounding is not None or not op.target.is_dense:
                each += 4 + 4  # levels, and the numbers that they are chosen for
            space = 0
            if op.rounding is not None and op.rounding.method == "adapter":
                space = workspace_bytes(
                    sum(delta.rank for delta in op.deltas if not delta.region.box) or 64, *_sides(op)
                )
            return each * elements + 2 * factors + panel + op.held_bytes + space


def _sides(op: Merge) -> tuple[int, int]:
    """Return the inputs and the outputs of one matrix."""
    sides = op.view.columns, op.view.rows
    return sides[::-1] if any(delta.region.transposed for delta in op.deltas) else sides


def _together(op: Merge, tiles: Sequence[tuple[int, int]]) -> Iterator[Sequence[PlacedDelta]]:
    """Yield the deltas that are at work at the same time: on each tile, those that meet it."""
    # Without boxes every delta is on all rows, so each tile meets all of them.
    if not any(delta.region.box for delta in op.deltas):
        yield op.deltas
        return
    spread = Spread(Block.of(op.view, delta.region.box) for delta in op.deltas)
    for start, end in tiles:
        yield [op.deltas[n] for n in spread.meeting(start, end)]


def _factor_bytes(delta: PlacedDelta) -> int:
    return sum(4 * math.prod(ref.shape) for ref in delta.factors.values())

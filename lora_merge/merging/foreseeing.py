"""Before anything is written: what each rounding would keep of the adapters' change, by a sample of the plan's weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.core.plan import Merge, Rounding
from lora_merge.core.report import Foreseen
from lora_merge.core.weight import FLOAT32
from lora_merge.deltas import keeps_effect
from lora_merge.merging.memory import InMemory
from lora_merge.merging.survival import effect_error_of, kept_of
from lora_merge.merging.worker import Merger
from lora_merge.planning.steps import tile_multiple
from lora_merge.runtime.torch_threads import one_torch_thread

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.plan import MergePlan, Step
    from lora_merge.core.report import Observer
    from lora_merge.core.tensor import Survival

_MOST = 48
"""Weights that are looked at, evenly spread over those that change."""


def foresee(plan: MergePlan, watch: Observer) -> dict[str, Foreseen]:
    """Return rounding → what it would keep of the weights that are looked at: some rows of some of those that change.

    Raises:
        CheckpointError: a source cannot be read.
        OutOfMemoryError: memory ran out.
    """
    changing = [step for step in plan.steps if isinstance(step.op, Merge) and _is_rounded(step.op)]
    chosen = changing[:: max(1, -(-len(changing) // _MOST))]
    found: dict[str, dict[str, Survival]] = {}
    merger = Merger(InMemory(0), "cpu", is_checked=False)
    with one_torch_thread():
        watch.phase("looking at a sample", sum(step.nbytes for step in chosen))
        for step in chosen:
            for method, survival in _of(merger, step).items():
                found.setdefault(method, {})[step.main.name] = survival
            watch.advance(step.nbytes)
            watch.done(step.name)
    return {method: _together(tensors) for method, tensors in found.items()}


def _together(tensors: Mapping[str, Survival]) -> Foreseen:
    unchanged = sum(one.unchanged for one in tensors.values()) / len(tensors)
    return Foreseen(kept_of(tensors), effect_error_of(tensors), unchanged, tensors)


def _is_rounded(op: Merge) -> bool:
    return op.target != FLOAT32 and any(not delta.facts.replaces_rows for delta in op.deltas)


def _of(merger: Merger, step: Step) -> Mapping[str, Survival]:
    """Return what each rounding would keep of one weight."""
    op = step.op
    assert isinstance(op, Merge)
    key = step.name if op.rounding is None else op.rounding.rng_key
    seed = 0 if op.rounding is None else op.rounding.seed
    roundings: dict[str, Rounding | None] = {"nearest": None, "stochastic": Rounding("stochastic", seed, key)}
    if any(map(keeps_effect, op.deltas)):
        roundings["adapter"] = Rounding("adapter", seed, key)
    # The smallest tile that every rounding can take.
    op = replace(op, multiple=tile_multiple(op, is_adapter=True))
    # A merge samples its middle tile too (`Sample`).
    tiles = [rows for rows in op.tiles(1) if rows[1] > rows[0]]
    return merger.foresee(op, tiles[len(tiles) // 2], roundings) if tiles else {}

"""Steps of a plan, made by hand: one plain tensor becomes another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.core.plan import Copy, Merge, Step
from lora_merge.core.weight import DENSE, WEIGHT, Storage, Weight

if TYPE_CHECKING:
    from lora_merge.core.tensor import TensorRef


def dense_merge(ref: TensorRef, *rest: Any, dtype: str | None = None) -> Merge:
    """Return what changes a plain tensor: the deltas, the view and so on are those of `Merge`."""
    return Merge(Weight.dense(ref), Storage(DENSE, dtype or ref.dtype), *rest)


def step_at(slot: TensorRef, op: Copy | Merge) -> Step:
    """Return the step that fills a place."""
    return Step(slot.name, {WEIGHT: slot}, op)

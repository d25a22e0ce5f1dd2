"""One tensor of the output, and what is done to it → the step that writes it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.core.plan import Combination, Copy, Merge, Step, View
from lora_merge.core.report import Issue, error
from lora_merge.core.tensor import LARGEST_FLOAT32
from lora_merge.plan.change import combined_rank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.facts import Reach
    from lora_merge.core.tensor import TensorRef
    from lora_merge.plan.change import Change
    from lora_merge.plan.settings import Policy


def step_for(slot: TensorRef, stored: TensorRef, change: Change, policy: Policy, key: str) -> Step:
    """Return the step that writes one tensor.

    Args:
        slot: its place.
        stored: the base's tensor of this name.
        change: what is done to it.
        policy: how changes of several adapters become one.
        key: what chance is drawn for, where the policy drops values at random.
    """
    source = change.source or stored
    is_replaced = change.source is not None
    deltas = settled(change.deltas, policy)
    if not deltas and (slot.dtype == source.dtype or source.nbytes == 0):  # nothing is there to be cast
        return Step((slot,), Copy(source), replaced=is_replaced)
    combination = _combination(deltas, policy, key) if len(slot.shape) > 1 else None
    reaches: set[Reach] = {delta.reach for delta in deltas}
    reach: Reach = (
        "tensor" if combination or "tensor" in reaches else "columns" if "columns" in reaches else "rows"
    )
    view = View.of(slot.shape, stacked=any(delta.facts.is_stacked or delta.region.box for delta in deltas))
    merge = Merge("dense", (source,), deltas, view, reach, combination)
    return Step((slot,), merge, replaced=is_replaced)


def settled(deltas: tuple[PlacedDelta, ...], policy: Policy) -> tuple[PlacedDelta, ...]:
    """Return the deltas of one tensor as they are applied, one after the other.

    Sums take the user's weight into their scale; where there are several, nothing is rounded in between.
    """
    several = len({delta.adapter for delta in deltas}) > 1
    if policy.combine != "linear":
        return tuple(map(_unrounded, deltas))
    if not (several or any(delta.adapter_weight != 1 for delta in deltas)):
        return deltas
    return tuple(
        replace(delta, scale=delta.scale * delta.adapter_weight, adapter_weight=1.0)
        if delta.facts.is_scaled
        else delta
        for delta in map(_unrounded, deltas)
    )


def _unrounded(delta: PlacedDelta) -> PlacedDelta:
    return replace(delta, rounded=False, round_before_next=False)


def _combination(deltas: tuple[PlacedDelta, ...], policy: Policy, key: str) -> Combination | None:
    """Return how the adapters' changes of one tensor become one; None for a sum."""
    if not deltas or policy.combine == "linear":
        return None
    return Combination(policy.combine, policy.density, policy.seed, combined_rank(deltas), key)


def beyond_float32(steps: Sequence[Step]) -> list[Issue]:
    """Return an error for each tensor with a change whose scale, weight included, is too large to multiply by."""
    hint = "look at lora_alpha and at the weights behind the adapters"
    return [
        error(
            "bad-field",
            step.slots[0].name,
            f"has the scale {scale:g}, expected one that float32 can hold",
            hint,
        )
        for step in steps
        if isinstance(step.op, Merge)
        for scale in [
            max((abs(delta.effective_scale * delta.adapter_weight) for delta in step.op.deltas), default=0.0)
        ]
        if not scale <= LARGEST_FLOAT32
    ]

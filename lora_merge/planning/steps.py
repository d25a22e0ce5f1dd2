"""One parameter of the output, and what is done to it → the steps that write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_merge.codecs import CODECS, ENCODERS
from lora_merge.core.plan import Combination, Copy, Merge, Step
from lora_merge.core.report import Issue, error
from lora_merge.core.tensor import LARGEST_FLOAT32, TensorRef
from lora_merge.core.view import View
from lora_merge.core.weight import Storage, Tile, Weight
from lora_merge.planning.change import Change, combined_rank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.facts import Reach
    from lora_merge.planning.settings import Policy


@dataclass(frozen=True, slots=True)
class Wanted:
    """One parameter of the output: its source, its change, and its place."""

    name: str
    stored: Weight
    """The base's, which may have another name."""

    change: Change
    """What is done to it."""

    target: Storage
    """How the output stores it."""

    writes: Mapping[str, TensorRef]
    """Role → place in the output."""

    rng_key: str
    """What chance is drawn for, where a policy drops values at random."""

    def steps(self, policy: Policy) -> list[Step]:
        """Return the steps that make it: one merge, or a copy of each part where nothing changes.

        Args:
            policy: how changes of several adapters become one.
        """
        own = self.change.source
        source = self.stored if own is None else Weight.dense(own)
        deltas = applied(self.change.deltas, policy)
        is_replaced = own is not None
        # A tensor without values has nothing to be cast.
        if not deltas and (self.target == source.storage or source.nbytes == 0):
            return [
                Step(slot.name, {role: slot}, Copy(source.parts[role]), is_replaced)
                for role, slot in self.writes.items()
            ]
        # The roles in the codec's order: the main part is the first.
        roles = ENCODERS[self.target.codec].parts(source.shape, self.target)
        merge = self._merge(source, deltas, policy)
        return [Step(self.name, {role: self.writes[role] for role in roles}, merge, is_replaced)]

    def _merge(self, source: Weight, deltas: tuple[PlacedDelta, ...], policy: Policy) -> Merge:
        # The methods are for matrices; changes of a vector add up.
        combination = self._combination(deltas, policy) if len(source.shape) > 1 else None
        reaches: set[Reach] = {delta.reach for delta in deltas}
        reach: Reach = (
            "tensor" if combination or "tensor" in reaches else "columns" if "columns" in reaches else "rows"
        )
        # Without a delta any view will do, and that of a stack has small rows.
        is_stacked = not deltas or any(delta.facts.is_stacked or delta.region.box for delta in deltas)
        view = View.of(source.shape, stacked=is_stacked)
        return Merge(source, self.target, deltas, view, reach, combination, _held_bytes(source, view))

    def _combination(self, deltas: tuple[PlacedDelta, ...], policy: Policy) -> Combination | None:
        """Return how the adapters' changes become one; None where they are applied in turn."""
        if not deltas or policy.combine == "linear":
            return None
        rank = combined_rank(deltas)
        return Combination(policy.combine, policy.density, policy.seed, rank, self.rng_key)


def _held_bytes(source: Weight, view: View) -> int:
    """Return the bytes that a tile of a single row needs, where they are a matrix and not its share of one."""
    if source.storage.is_dense or not view.n_rows:
        return 0
    codec = CODECS[source.storage.codec]
    rows, _ = codec.alignment(source.shape, view.n_rows, source.storage)
    tile = Tile(source.shape, view.n_rows, 0, min(rows, view.rows))
    nbytes = sum(part.nbytes for part in codec.ranges(tile, source.storage).values())
    return nbytes if 2 * nbytes * view.blocks > source.nbytes else 0


def applied(deltas: tuple[PlacedDelta, ...], policy: Policy) -> tuple[PlacedDelta, ...]:
    """Return the deltas of one parameter as they are applied, one after the other."""
    # Rounding in between is PEFT's way for one adapter. Sums of several, and weighted ones, are rounded once.
    several = len({delta.adapter for delta in deltas}) > 1
    if policy.combine != "linear":
        return tuple(map(_unrounded, deltas))
    if not (several or any(delta.adapter_weight != 1 for delta in deltas)):
        return deltas
    return tuple(
        # Trained rows and the like have no scale: they keep the weight.
        replace(delta, scale=delta.scale * delta.adapter_weight, adapter_weight=1.0)
        if delta.facts.is_scaled
        else delta
        for delta in map(_unrounded, deltas)
    )


def _unrounded(delta: PlacedDelta) -> PlacedDelta:
    return replace(delta, rounded=False, round_before_next=False)


def beyond_float32(steps: Sequence[Step]) -> list[Issue]:
    """Return an error for each parameter with a change whose scale, times the adapter's weight, exceeds float32."""
    hint = "look at lora_alpha and at the weights behind the adapters"
    return [
        error("bad-field", step.name, f"has the scale {scale:g}, expected one that float32 can hold", hint)
        for step in steps
        if isinstance(step.op, Merge)
        for scale in [
            max((abs(delta.effective_scale * delta.adapter_weight) for delta in step.op.deltas), default=0.0)
        ]
        # Negated, so that NaN is wrong too.
        if not scale <= LARGEST_FLOAT32
    ]

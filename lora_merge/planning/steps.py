"""One parameter of the output, and what is done to it → the steps that write it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from lora_merge.codecs import CODECS, ENCODERS
from lora_merge.core.plan import Combination, Copy, Merge, Rounding, Step
from lora_merge.core.report import Issue, error
from lora_merge.core.tensor import LARGEST_FLOAT32, TensorRef
from lora_merge.core.view import View
from lora_merge.core.weight import FLOAT32, WEIGHT, Storage, Tile, Weight
from lora_merge.deltas import keeps_effect
from lora_merge.planning.change import Change, combined_rank
from lora_merge.rounding.feedback import band_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.facts import Reach
    from lora_merge.planning.quantising import Targets
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
            return [self._copy(source, role) for role in self.writes]
        merge = self._merge(source, deltas, policy)
        if merge.on_stored_grid:
            # The scales stay, so only the codes are written; the rest is copied.
            changed = Step(self.name, {WEIGHT: self.writes[WEIGHT]}, merge)
            return [changed, *(self._copy(source, role) for role in self.writes if role != WEIGHT)]
        return [Step(self.name, self.writes, merge, is_replaced)]

    def _copy(self, source: Weight, role: str) -> Step:
        """Return the step that copies a part as it is."""
        slot = self.writes[role]
        return Step(slot.name, {role: slot}, Copy(source.parts[role]), self.change.source is not None)

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
        on_stored_grid = policy.out_storage == "base" and self.is_as_stored and not self.target.is_dense
        rounding = self._rounding(deltas, policy, on_stored_grid=on_stored_grid)
        if rounding is not None:
            deltas = tuple(map(_unrounded, deltas))
        held = _held_bytes(self.target, source.shape, view)
        merge = Merge(
            source,
            self.target,
            deltas,
            view,
            reach,
            combination,
            _held_bytes(source.storage, source.shape, view) + held,
            rounding,
            on_stored_grid,
            fills_across=held > 0,
        )
        is_adapter = rounding is not None and rounding.method == "adapter"
        return replace(merge, multiple=tile_multiple(merge, is_adapter=is_adapter))

    @property
    def is_as_stored(self) -> bool:
        """True where the output stores the parameter in the base's own way."""
        return self.change.source is None and self.target == self.stored.storage

    def _rounding(
        self, deltas: tuple[PlacedDelta, ...], policy: Policy, *, on_stored_grid: bool
    ) -> Rounding | None:
        """Return how values become numbers of the storage; None for the nearest."""
        method = policy.rounding or ("adapter" if on_stored_grid else "nearest")
        # What only changes its storage has no adapter's effect to lose, and rounding it at random would only add noise.
        if method == "nearest" or not deltas or self.target == FLOAT32:
            return None
        if method == "adapter" and not any(map(keeps_effect, deltas)):
            return None
        return Rounding(method, policy.seed, self.rng_key)

    def _combination(self, deltas: tuple[PlacedDelta, ...], policy: Policy) -> Combination | None:
        """Return how the adapters' changes become one; None where they are applied in turn."""
        if not deltas or policy.combine == "linear":
            return None
        rank = combined_rank(deltas)
        return Combination(policy.combine, policy.density, policy.seed, rank, self.rng_key)


def tile_multiple(op: Merge, *, is_adapter: bool) -> int:
    """Return the rows at a multiple of which each tile begins, see `Merge.multiple`: what the codecs of both storages need,
    and the rounding.

    Args:
        op: what is done to a weight.
        is_adapter: whether it may be rounded for the adapter.
    """
    shape, n_rows = op.source.shape, op.view.n_rows
    storages = (op.source.storage, op.target)
    multiples = [CODECS[one.codec].alignment(shape, n_rows, one)[0] for one in storages]
    if not op.on_stored_grid:
        multiples.append(ENCODERS[op.target.codec].fresh_alignment(shape, op.target))
    if is_adapter:
        # Of a weight stored [in, out] the rule needs all inputs of an output.
        if any(delta.region.transposed for delta in op.deltas if keeps_effect(delta)):
            return 0
        multiples.append(band_rows(op.view.columns))
    return math.lcm(*multiples)


@lru_cache(maxsize=4096)  # A model has thousands of matrices of few shapes.
def _held_bytes(storage: Storage, shape: tuple[int, ...], view: View) -> int:
    """Return the bytes that a tile of a single row needs, where they are a matrix and not its share of one."""
    if storage.is_dense or not view.n_rows:
        return 0
    codec = CODECS[storage.codec]
    rows, _ = codec.alignment(shape, view.n_rows, storage)
    one, whole = (
        sum(part.nbytes for part in codec.ranges(Tile(shape, view.n_rows, 0, end), storage).values())
        for end in (min(rows, view.rows), view.rows)
    )
    # A codec that wants most of a matrix for its first rows wants all of it for every tile.
    return one if 2 * one > whole else 0


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


def with_survey(steps: Sequence[Step], targets: Targets) -> tuple[Step, ...]:
    """Return steps that know the weights whose values their own scales depend on: those that an engine fuses them with."""
    merges = {step.name: step.op for step in steps if isinstance(step.op, Merge)}
    return tuple(
        replace(
            step,
            op=replace(step.op, surveyed=tuple(merges[mate] for mate in targets.weights[step.name].mates)),
        )
        if isinstance(step.op, Merge) and step.name in targets.weights
        else step
        for step in steps
    )


def beyond_float32(steps: Sequence[Step]) -> list[Issue]:
    """Return an error for each parameter with a change whose scale, times the adapter's weight, exceeds float32."""
    hint = "check lora_alpha, and the weights given with --adapter PATH:WEIGHT"
    return [
        error("bad-field", step.name, f"has the scale {scale:g}, which float32 cannot hold", hint)
        for step in steps
        if isinstance(step.op, Merge)
        for scale in [
            max((abs(delta.effective_scale * delta.adapter_weight) for delta in step.op.deltas), default=0.0)
        ]
        # Negated, so that NaN is wrong too.
        if not scale <= LARGEST_FLOAT32
    ]

"""Deltas on a tile: the algebras that change some of its rows, applied in order, or combined."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.view import Block, Spread
from lora_merge.deltas import combine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.plan import Merge
    from lora_merge.deltas.algebra import Changer


class Working:
    """The algebras of a step, by row: each is made when the first of its rows comes, and dropped after the last. So
    of a stack of experts, only those that a tile meets are made at a time.
    """

    def __init__(self, op: Merge, make: Callable[[PlacedDelta], Changer]) -> None:
        self._op, self._make = op, make
        self._made: dict[int, Changer] = {}
        self._always: list[tuple[PlacedDelta, Changer]] | None = None
        self._spread: Spread | None = None
        if any(delta.region.box for delta in op.deltas):
            self._spread = Spread(Block.of(op.view, delta.region.box) for delta in op.deltas)

    def on(self, start: int, end: int) -> list[tuple[PlacedDelta, Changer]]:
        """Return the deltas that change some of the rows ``start`` to ``end``, in the order of the plan."""
        if self._spread is None:
            # No delta is limited to a box, so all of them change every tile.
            if self._always is None:
                self._always = [(delta, self._make(delta)) for delta in self._op.deltas]
            return self._always
        deltas = self._op.deltas
        # Tiles come in order: what this one does not meet is over, and its factors can go.
        self._made = {
            n: self._made[n] if n in self._made else self._make(deltas[n])
            for n in self._spread.meeting(start, end)
        }
        return [(deltas[n], changer) for n, changer in self._made.items()]


def change(
    values: torch.Tensor, start: int, end: int, op: Merge, changers: list[tuple[PlacedDelta, Changer]]
) -> None:
    """Apply every delta of a step to a row tile, in place; with a combination, their combined change.

    Shapes:
        values: float32 ``[end - start, cols]``, rows ``start`` to ``end`` of the stored weight.
    """
    if op.combination is not None:
        values.add_(_combined(values, start, end, op, changers))
        return
    # DoRA's lengths are those of the base plus its own delta, whatever changed the tile before, so the base's
    # values are kept. Sums do not look back, and the copy is saved.
    several = len(changers) > 1 and any(delta.facts.looks_back for delta, _ in changers)
    base = values.clone() if several else values
    for delta, changer in changers:
        if delta.adapter_weight == 1:
            changer.apply(values, base, start, end)
        else:
            values.add_(_difference(values, start, end, [changer]), alpha=delta.adapter_weight)


def _combined(
    values: torch.Tensor, start: int, end: int, op: Merge, changers: list[tuple[PlacedDelta, Changer]]
) -> torch.Tensor:
    """Return the combined change of several adapters to a whole tensor, float32, in the shape of ``values``."""
    assert op.combination is not None
    changes, weights = [], []
    for adapter in sorted({delta.adapter for delta, _ in changers}):
        own = [(delta, changer) for delta, changer in changers if delta.adapter == adapter]
        changes.append(_difference(values, start, end, [changer for _, changer in own]))
        weights.append(own[0][0].adapter_weight)
    # A stack of matrices gets a separate dimension: `svd` works on each matrix.
    if op.view.blocks > 1:
        changes = [change.view(op.view.blocks, op.view.rows, op.view.columns) for change in changes]
    return combine(changes, weights, op.combination).view(values.shape)


def _difference(weight: torch.Tensor, start: int, end: int, changers: Iterable[Changer]) -> torch.Tensor:
    """Return what some algebras change in a weight; the weight itself is not changed."""
    changed = weight.clone()
    for changer in changers:
        changer.apply(changed, weight, start, end)
    return changed.sub_(weight)

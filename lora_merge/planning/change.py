"""What a merge does to one tensor of the output, and when two such changes are the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from lora_merge.core.adapter import PlacedDelta
from lora_merge.core.tensor import TensorRef


@dataclass(frozen=True, slots=True)
class Change:
    """What a merge does to one tensor of the output."""

    own: TensorRef | None = None
    """The adapter's own tensor, where it takes the place of the base's."""

    deltas: tuple[PlacedDelta, ...] = ()
    copy: TensorRef | None = None
    """The base's own tensor as the adapter carries it: resized, for example. Both ends of a tie have it."""

    @property
    def source(self) -> TensorRef | None:
        """The tensor that takes the place of the base's, if there is one."""
        return self.own or self.copy


def with_one_base(embedding: Change | None, head: Change | None) -> tuple[Change | None, Change | None]:
    """Return the changes of two tied ends; an adapter's copy of the base's tensor is at both of them."""
    # PEFT loads the copy into the parameter that both ends share.
    copy = next((change.copy for change in (embedding, head) if change and change.copy), None)
    if copy is None:
        return embedding, head
    first, second = (change or Change() for change in (embedding, head))
    return replace(first, copy=first.copy or copy), replace(second, copy=second.copy or copy)


def alike(one: Change, other: Change, twins: frozenset[frozenset[str]]) -> bool:
    """Return True when two changes make the same tensor of the same tensor.

    Args:
        one: the first.
        other: the second.
        twins: pairs of names of tensors with equal values.
    """
    if one is other:
        return True
    if one.source is None or other.source is None:
        same_source = one.source is other.source
    else:
        same_source = one.source == other.source or frozenset((one.source.name, other.source.name)) in twins
    return same_source and _same_deltas(one, other, twins)


def _same_deltas(one: Change, other: Change, twins: frozenset[frozenset[str]]) -> bool:
    """Return True when two lists of deltas differ only in names."""
    if len(one.deltas) != len(other.deltas):
        return False
    for mine, yours in zip(one.deltas, other.deltas, strict=True):
        if _nameless(mine) != _nameless(yours):
            return False
        for role, ref in mine.factors.items():
            # Equal values under two names count: PEFT saves both ends of a tie.
            if frozenset((ref.name, yours.factors[role].name)) not in twins | {frozenset((ref.name,))}:
                return False
    return True


def _nameless(placed: PlacedDelta) -> PlacedDelta:
    """Return a change without names, and without the adapter format's idea of which axis is which."""
    stated = replace(placed.delta, parameter="", factors={}, transposed=False)
    return replace(placed, delta=stated, tensor="", rule="")


def combined_rank(deltas: tuple[PlacedDelta, ...]) -> int:
    """Return the largest rank that one adapter's change of one matrix can have.

    Args:
        deltas: all changes of one tensor.
    """
    ranks = [0]
    for n in {delta.adapter for delta in deltas}:
        own = [delta for delta in deltas if delta.adapter == n]
        parts: Counter[object] = Counter()
        for delta in own:
            if delta.region.box:
                # Parts of one matrix (q, k and v of a fused weight) add up; those of different experts do not.
                parts[delta.region.box[0] if len(delta.region.box) == 3 else None] += delta.rank
        whole = max((delta.rank for delta in own if not delta.region.box), default=0)
        ranks.append(whole + max(parts.values(), default=0))
    return max(ranks)

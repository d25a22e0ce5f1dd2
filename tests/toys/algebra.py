"""An algebra: rows of a weight are multiplied, each by a number of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from lora_merge.core.adapter import Delta
from lora_merge.core.facts import Facts
from lora_merge.deltas.algebra import Unsurveyed


@dataclass(frozen=True, slots=True)
class GainFacts(Facts):
    """Of a weight whose rows are multiplied by the values of one column."""

    column: int
    algebra: Literal["gain"] = "gain"

    def reach(self, *, transposed):
        return "tensor" if transposed else "rows"


class Gain(Unsurveyed):
    """W[i] ← g[i] · W[i]."""

    facts: ClassVar[type[Facts]] = GainFacts

    def __init__(self, delta, factors, stored):
        del stored
        self._gain = factors["gain"].float()[:, delta.facts.column]

    def apply(self, weight, base, start, end):
        del base
        weight.mul_(self._gain[start:end].view(-1, 1))


def stating_gains(known):
    """Return a format whose low-rank deltas are stated as gains, by a column of their B."""

    def read(root, ignored=()):
        adapter = known.read(root, ignored)
        return adapter and replace(adapter, deltas=tuple(map(_as_gain, adapter.deltas)))

    return replace(known, read=read)


def _as_gain(delta):
    return Delta(delta.parameter, GainFacts(1), {"gain": delta.factors["B"]})

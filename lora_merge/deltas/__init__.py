"""Algebras: what an adapter does to a weight. One class per algebra; `ALGEBRAS` is the table.

A delta is not always a sum, so an algebra changes the weight itself, a row tile at a time where rows allow it. Beside its
arithmetic, each algebra has a dataclass of facts: what its deltas state, and what kind of change it makes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.deltas.algebra import Algebra, keeps_effect
from lora_merge.deltas.combinations import COMBINATIONS, combine
from lora_merge.deltas.dora import Dora, DoraFacts
from lora_merge.deltas.factors import FactorFacts, Factors, Stack
from lora_merge.deltas.low_rank import LowRank, LowRankFacts, Stacked, StackedFacts, plain_pair
from lora_merge.deltas.part import Part
from lora_merge.deltas.peft_layer import PeftLayer, PeftLayerFacts
from lora_merge.deltas.whole import Addition, AdditionFacts, Rows, RowsFacts

if TYPE_CHECKING:
    from collections.abc import Mapping

ALGEBRAS: Mapping[str, type[Algebra]] = {
    "low_rank": LowRank,
    "stacked": Stacked,
    "dora": Dora,
    "addition": Addition,
    "rows": Rows,
    "peft_layer": PeftLayer,
}
"""By the name that `Facts.algebra` has, in plans and in JSON."""

__all__ = [
    "ALGEBRAS",
    "COMBINATIONS",
    "AdditionFacts",
    "Algebra",
    "DoraFacts",
    "FactorFacts",
    "Factors",
    "LowRankFacts",
    "Part",
    "PeftLayerFacts",
    "RowsFacts",
    "Stack",
    "StackedFacts",
    "combine",
    "keeps_effect",
    "plain_pair",
]

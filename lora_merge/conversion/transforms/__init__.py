"""Transforms: the factors of one module → other factors. One file for each; `TRANSFORMS` is the table.

A transform sees one module at a time, so memory is bounded by the largest module. The table has the order in which
they are applied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.conversion.transforms.bake_scale import BakeScale
from lora_merge.conversion.transforms.pad_rank import PadRank
from lora_merge.conversion.transforms.pair import Pair, Transform
from lora_merge.conversion.transforms.reduce_rank import ReduceRank
from lora_merge.conversion.transforms.rounding import rounded
from lora_merge.conversion.transforms.to_lora import factorised, stacked

if TYPE_CHECKING:
    from collections.abc import Mapping

TRANSFORMS: Mapping[str, type[Transform]] = {
    # Truncation first: it would take padded zeros away again.
    "reduce_rank": ReduceRank,
    "bake_scale": BakeScale,
    "pad_rank": PadRank,
}

__all__ = [
    "TRANSFORMS",
    "BakeScale",
    "PadRank",
    "Pair",
    "ReduceRank",
    "Transform",
    "factorised",
    "rounded",
    "stacked",
]

"""Transforms: the factors of one module → other factors. One file per transform; `TRANSFORMS` is the table.

They work module by module, so that memory is bounded by the largest of them. In the order in which they are applied.
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

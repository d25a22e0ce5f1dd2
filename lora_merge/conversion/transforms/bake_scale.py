"""Folds the scale into B, so that engines agree, whatever they make of α, rsLoRA and patterns."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from lora_merge.conversion.transforms.pair import Pair


class BakeScale:
    """B ← s · B, s ← 1. With α = r, an engine that computes α/r multiplies by one."""

    exact: ClassVar[bool] = True

    def __call__(self, pair: Pair) -> Pair:
        """Return the factors with the scale in B, in float32; unchanged where it is 1."""
        return pair if pair.scale == 1 else replace(pair, b=pair.b * pair.scale, scale=1.0)

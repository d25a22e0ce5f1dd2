"""Scales folded into B, so that every engine computes the same, whatever it makes of α, rsLoRA and patterns."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from lora_merge.conversion.transforms.pair import Pair


class BakeScale:
    """B ← s · B, s ← 1: with α = r an engine that knows nothing but α/r multiplies by one."""

    exact: ClassVar[bool] = True

    def __call__(self, pair: Pair) -> Pair:
        """Return the factors with the scale in B."""
        return pair if pair.scale == 1 else replace(pair, b=pair.b * pair.scale, scale=1.0)

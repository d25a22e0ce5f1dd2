"""Pads factors with zeros, for engines that serve a few ranks only, or one rank for all modules."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from lora_merge.conversion.transforms.pair import Pair


class PadRank:
    """A ← [A; 0], B ← [B, 0]. The product gains terms that are zero, so its values stay.

    Args:
        rank: the resulting rank, not smaller than that of any pair.
    """

    exact: ClassVar[bool] = True

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __call__(self, pair: Pair) -> Pair:
        """Return the factors with rows of zeros added to A, and columns of zeros to B."""
        from torch.nn.functional import pad

        missing = self._rank - pair.rank
        assert missing >= 0
        return (
            replace(pair, a=pad(pair.a, (0, 0, 0, missing)), b=pad(pair.b, (0, missing))) if missing else pair
        )

"""Factors with rows and columns of zeros, for engines that have but a few ranks, or one for all modules."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from lora_merge.conversion.transforms.pair import Pair


class PadRank:
    """A ← [A; 0], B ← [B, 0], of one rank; the product has the same terms, and some that are zero.

    Args:
        rank: of what comes out; no pair may have a larger one.
    """

    exact: ClassVar[bool] = True

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __call__(self, pair: Pair) -> Pair:
        """Return the factors, padded."""
        from torch.nn.functional import pad

        missing = self._rank - pair.rank
        assert missing >= 0
        return (
            replace(pair, a=pad(pair.a, (0, 0, 0, missing)), b=pad(pair.b, (0, missing))) if missing else pair
        )

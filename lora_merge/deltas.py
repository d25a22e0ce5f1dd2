"""Algebras: what an adapter does to a weight. One class per algebra; `ALGEBRAS` is the table.

A delta is not always a sum, so an algebra changes the weight itself, a row tile at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from lora_merge.core.adapter import DeltaSpec


_FUSED_RANK = 128
"""Up to this rank a product is summed in one block, before it is added (measured: up to 192 with MKL)."""

_FUSED_SIDE = 64
"""Smaller matrices go through other kernels, which sum in another order."""


class Algebra(Protocol):
    """One delta, ready to change the tiles of one weight."""

    def apply(self, weight: torch.Tensor, start: int, end: int) -> None:
        """Change rows ``start`` to ``end`` of the stored weight, in place.

        Shapes:
            weight: float32 ``[end - start, cols]``, on the device of the factors.
        """


class LowRank:
    """W ← W + s · B A, or its transpose for a weight stored ``[in, out]``.

    The bits are PEFT's: the product is formed first, scaled after, and then added. Where scaling is exact (a
    power of two) and the product is of one block (`_FUSED_RANK`), the matrix library may add it to the
    weight itself, which has the same bits and saves two passes over the tile.

    Shapes:
        A: float32 ``[r, in]``; B: float32 ``[out, r]``.

    Reference:
        Hu et al., 2021, https://arxiv.org/abs/2106.09685; ``peft.tuners.lora.layer.Linear.merge`` with
        ``safe_merge=False`` (PEFT 0.21.2).
    """

    def __init__(self, spec: DeltaSpec, factors: Mapping[str, torch.Tensor]) -> None:
        self._a, self._b = factors["A"], factors["B"]
        self._scale = spec.scale
        self._transposed = spec.region.transposed
        exact = math.frexp(spec.scale)[0] == 0.5
        self._fused = (
            exact and spec.rank <= _FUSED_RANK and min(len(self._b), self._a.shape[1]) >= _FUSED_SIDE
        )
        if self._fused:
            self._b = self._b * spec.scale
        self._buffer: torch.Tensor | None = None

    def apply(self, weight: torch.Tensor, start: int, end: int) -> None:
        """Add the rows' part of the delta."""
        if self._transposed:
            left, right = self._b, self._a[:, start:end]
        else:
            left, right = self._b[start:end], self._a
        if not self._fused:
            product = self._product(left, right)
            weight.add_(product.T if self._transposed else product)
        elif self._transposed:
            weight.addmm_(right.T, left.T)
        else:
            weight.addmm_(left, right)

    def _product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return ``s · left @ right`` in a buffer that the next call reuses."""
        import torch

        shape = (left.shape[0], right.shape[1])
        if self._buffer is None or self._buffer.shape != shape:
            self._buffer = torch.empty(shape, dtype=torch.float32, device=left.device)
        return torch.mm(left, right, out=self._buffer).mul_(self._scale)


ALGEBRAS: Mapping[str, type[LowRank]] = {"low_rank": LowRank}

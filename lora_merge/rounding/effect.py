"""How much of an adapter's effect a rounding keeps: sums of squares in the row space of its A, from tiles."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_AT_ONCE = 1 << 20
"""Values that are widened to float64 at a time."""


@dataclass(frozen=True, slots=True)
class InSpan:
    """Sums of squares over some lines, seen through an orthonormal basis Q of the adapter's row space."""

    error: float
    """Of (stored - v) Qᵀ, where v is the exact merged weight."""

    wanted: float
    """Of Δ Qᵀ, where Δ is what the adapter changes."""

    kept: float
    """Of the products of (stored - W) Qᵀ and Δ Qᵀ: the part of the change that arrived, times `wanted`."""

    def __add__(self, other: InSpan) -> InSpan:
        return InSpan(self.error + other.error, self.wanted + other.wanted, self.kept + other.kept)

    @property
    def relative_error(self) -> float:
        """The error of the adapter's effect, as a share of that effect; 0 where there is none to lose."""
        if not self.wanted:
            return 0.0
        return sqrt(self.error / self.wanted)

    @property
    def share_kept(self) -> float:
        """The share of the adapter's effect that arrived, 1 where there is none to lose."""
        if not self.wanted:
            return 1.0
        return self.kept / self.wanted


NOTHING = InSpan(0.0, 0.0, 0.0)


def in_span(
    stored: torch.Tensor,
    values: torch.Tensor,
    base: torch.Tensor,
    basis: torch.Tensor,
    *,
    along: bool = False,
) -> InSpan:
    """Measure in float64 what is kept of an adapter's effect on some lines.

    Shapes:
        stored: what the output holds, decoded; values: the exact merged weight v = W + Δ; base: W; all float32 ``[lines,
        in]``, along: ``[in, out]``, all lines of a matrix; basis: float32 ``[r, in]``, orthonormal.
    """
    if along:
        stored, values, base = stored.t(), values.t(), base.t()
    turned = basis.double().t()
    found = NOTHING
    n = max(_AT_ONCE // max(values.shape[1], 1), 1)
    for start in range(0, len(values), n):
        exact = values[start : start + n].double()
        error = (stored[start : start + n].double() - exact) @ turned
        wanted = (exact - base[start : start + n].double()) @ turned
        kept = (error + wanted).mul_(wanted).sum().item()
        found += InSpan(error.square().sum().item(), wanted.square().sum().item(), kept)
    return found

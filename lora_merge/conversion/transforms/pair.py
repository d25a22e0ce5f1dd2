"""The factors of one module, in memory, and the protocol of a transform."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    import torch  # noqa: TC004 - a field's type, never evaluated


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """ΔW = s · B A of one module, or of each expert of a stack.

    Shapes:
        a: float32 ``[r, in]`` or ``[experts, r, in]``; b: ``[out, r]`` or ``[experts, out, r]``. The kernel of a
        convolution is flat in ``in``.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The rank r, the same for all experts of a stack."""
        return int(self.a.shape[-2])

    def equals(self, other: Pair) -> bool:
        """Return True if both pairs have the same values and scales; dtypes may differ."""
        import torch

        return (
            self.scale == other.scale
            and self.a.shape == other.a.shape
            and torch.equal(self.a.float(), other.a.float())
            and torch.equal(self.b.float(), other.b.float())
        )

    def norm(self) -> float:
        """Return ‖ΔW‖ in the Frobenius norm, from the factors alone."""
        return abs(self.scale) * sqrt(_inner(self, self))

    def distance(self, other: Pair) -> float:
        """Return ‖ΔW - ΔW′‖ in the Frobenius norm, from the factors alone.

        Relative to ‖ΔW‖ it is right to about 1e-8: the squares are summed in float64.
        """
        squared = self.norm() ** 2 + other.norm() ** 2 - 2 * self.scale * other.scale * _inner(self, other)
        # The difference of nearly equal squares may come out below zero.
        return sqrt(max(squared, 0.0))


def _inner(one: Pair, other: Pair) -> float:
    """Return ⟨B A, B′ A′⟩ in float64, summed over experts."""
    # tr((B A)ᵀ B′ A′) = Σ (Bᵀ B′) ∘ (A A′ᵀ): two r × r′ matrices, never the product itself.
    left = one.b.double().mT @ other.b.double()
    right = one.a.double() @ other.a.double().mT
    return float((left * right).sum())


class Transform(Protocol):
    """Replaces the factors of one module. Construction takes the settings, a call the factors."""

    exact: ClassVar[bool]
    """True if ΔW stays the same, up to the rounding of float32."""

    def __call__(self, pair: Pair) -> Pair:
        """Return new factors; the given pair is not changed."""

"""What is measured of a stored weight, and of what a model computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Arrived:
    """What a stored weight has of the change that was asked for. W is the base, Δ the change, S what is stored."""

    kept: float
    """⟨S - W, Δ⟩ / ‖Δ‖²: 1 where all of the change arrived, 0 where none did. Noise counts neither for nor against it."""

    in_span: float
    """‖(S - W - Δ)Qᵀ‖ / ‖ΔQᵀ‖ with Q an orthonormal basis of A's rows: the error of the adapter's effect."""

    noise: float
    """‖S - W - Δ‖: the error of all values."""


def arrived(before: torch.Tensor, stored: torch.Tensor, delta: torch.Tensor, factor: torch.Tensor) -> Arrived:
    """Measure a stored weight, in float64.

    Args:
        before: the base's values, as they are decoded.
        stored: those of the output.
        delta: the change that was asked for.
        factor: A.

    Shapes:
        before, stored, delta: ``[out, in]``; factor: ``[r, in]``.
    """
    import torch

    delta = delta.double()
    error = stored.double() - before.double() - delta
    basis = torch.linalg.qr(factor.double().t()).Q
    kept = 1 + float((error * delta).sum() / delta.square().sum())
    in_span = float((error @ basis).norm() / (delta @ basis).norm())
    return Arrived(kept, in_span, float(error.norm()))


def gain_kept(base: float, unmerged: float, loss: float) -> float:
    """Return how much of what an adapter gains a merged model has.

    Args:
        base: loss of the base on the adapter's task.
        unmerged: loss of base and adapter.
        loss: of the merged model.

    Example:
        >>> gain_kept(2.0, 1.0, 1.5)
        0.5
    """
    return (base - loss) / (base - unmerged)


@dataclass(frozen=True, slots=True)
class Moved:
    """How logits of a merged model compare with those of the exact merge."""

    kept: float
    """Share of the adapter's effect on the logits, along that effect."""

    error: float
    """‖logits - exact‖ / ‖exact - base‖."""


def moved(base: torch.Tensor, exact: torch.Tensor, logits: torch.Tensor) -> Moved:
    """Compare the logits of three models for the same inputs, all of one shape."""
    effect = (exact - base).double()
    found = (logits - base).double()
    kept = float((found * effect).sum() / effect.square().sum())
    return Moved(kept, float((found - effect).norm() / effect.norm()))

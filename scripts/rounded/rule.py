"""The rule of ``--rounding adapter`` at its plainest: one row, a grid of whole numbers, one column after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def nearest(wanted: Sequence[float]) -> list[int]:
    """Return each value's nearest whole number."""
    return [round(value) for value in wanted]


def for_adapter(wanted: Sequence[float], direction: Sequence[float], damping: float) -> list[int]:
    """Return whole numbers whose error is small in one direction.

    Args:
        wanted: W + Δ, in steps of the grid.
        direction: of the adapter's A, of length 1.
        damping: λ.

    Example:
        >>> for_adapter([0.25] * 4, [0.5] * 4, 0.1)
        [0, 0, 1, 0]
    """
    error, stored = 0.0, []
    for value, q in zip(wanted, direction, strict=True):
        chosen = round(value - error * q / (damping + q * q))
        stored.append(chosen)
        error += (chosen - value) * q
    return stored

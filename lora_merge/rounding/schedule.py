"""How strongly the error is fed back, column by column; and how many columns are decided at the same time."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch  # noqa: TC004 - a field's type, never evaluated

_PANEL = 128
"""Columns that are transposed at a time: with 1024 lines, their buffers are in a processor's second cache."""

_TAPER = 0.25
"""λ of a column is at most this share of what the columns after it have of the basis."""

_SWEEPS = (0.2, 0.05)
"""λ of each sweep over the last columns, in units of the mean of ‖q‖²."""

_GAIN = 8
"""A block may correct one part in this many of the error without its columns knowing of each other."""

BLOCK = 16
"""Columns of a block at most: with more, a correction is spread so thin that none of them crosses a threshold."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """What one pass over the columns of a matrix needs.

    Shapes:
        basis: float32 ``[r, in]``; pulls: float32 ``[in, r]``, the column's q over (λ + q·q).
    """

    basis: torch.Tensor
    pulls: torch.Tensor

    damping: float

    panels: tuple[int, ...]
    """Columns of each panel. Those of the last are decided again."""

    sweeps: tuple[float, ...]
    """λ of each time that the last panel is decided again."""

    @classmethod
    def of(cls, basis: torch.Tensor, damping: float) -> Schedule:
        """Return the schedule for a basis.

        λ is ``damping``, but where few columns are left the error has to be gone soon: λ falls with the share of the basis
        that is still to come. So most columns have the little noise of a large λ, and what is left at the end is that of a
        small one.
        """
        rank, n_columns = basis.shape
        exact = basis.double()
        squares = exact.square().sum(0)
        mean = rank / n_columns
        to_come = (squares.sum() - squares.cumsum(0)).div_(rank)
        each = to_come.mul_(_TAPER).clamp_(max=damping).clamp_(min=_SWEEPS[-1] * mean)
        pulls = (exact / (squares + each)).t().float().contiguous()
        again = min(n_columns, max(_PANEL, (1 << 18) // n_columns))
        before = n_columns - again
        panels = (*(min(_PANEL, before - first) for first in range(0, before, _PANEL)), again)
        return cls(basis, pulls, damping, panels, tuple(share * mean for share in _SWEEPS))

    @property
    def n_columns(self) -> int:
        """All columns, ``in``."""
        return self.basis.shape[1]

    def blocks(self, first: int, n: int) -> Iterator[int]:
        """Yield the sizes of the blocks of ``n`` columns from ``first``: columns that are decided at the same time.

        Each column corrects what it sees of the error, as if the others did not. Together they correct about
        ``size / (in · λ + r)`` of it, which has to stay small.
        """
        rank = len(self.basis)
        end = first + n
        while first < end:
            left = self.n_columns - first
            most = (min(self.damping * self.n_columns, _TAPER * left) + rank) / _GAIN
            size = BLOCK
            while size > max(most, 1):
                size //= 2
            size = min(size, end - first)
            yield size
            first += size


def damping_for(rank: int, columns: int) -> float:
    """Return λ for a matrix, by the number of directions and of columns.

    Example:
        >>> damping_for(16, 4096)
        0.05
    """
    return min(max(0.8 * sqrt(rank / columns), 0.01), 0.2)

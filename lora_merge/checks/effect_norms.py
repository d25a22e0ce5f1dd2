"""Norms of what rounding did to the adapters' effect on a weight, and what they are held to."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_merge.core.tensor import Survival

_SUMS = 16
"""Standard errors of a float32 sum that are accepted."""

_DIGITS = 1e-6
"""Relative difference: a manifest has nine digits."""

_FEW_ROWS = 8
_UNLIKE = 32
"""Of at least `_FEW_ROWS` rows, how many times the recorded norm of as many rows theirs may be: scales differ from row to row."""

_LOST = 0.1
"""Share of the effect that the nearest numbers must lose before it is a fault that the stored ones lose as much."""


def share_of(n_inputs: int, rank: int) -> float:
    """Return by what share of its length float32 may have missed what is seen of an error, in sums of products."""
    return _SUMS * 2.0**-24 * sqrt(n_inputs * rank)


@dataclass(slots=True)
class Sums:
    """Squares, over all outputs that were seen; and how far off what was recorded of them may be."""

    error: float = 0.0
    nearest: float = 0.0
    within: float = 0.0
    """``nearest``, of the values alone that have numbers on both sides: others cannot become larger."""

    steps: float = 0.0
    """What one value's step changes of the effect. Where all of the effect is less, no choice of numbers keeps it."""

    effect: float = 0.0
    error_off: float = 0.0
    effect_off: float = 0.0
    square_off: float = 0.0
    is_narrow: bool = False
    """True if the adapter sees a good part of all directions of some inputs: there rounding cannot keep its effect."""

    n_rows: int = 0
    n_values: int = 0


@dataclass(frozen=True, slots=True)
class Norms:
    """The roots of the sums."""

    error: float
    nearest: float
    within: float
    steps: float
    effect: float
    error_off: float
    effect_off: float

    @classmethod
    def of(cls, sums: Sums) -> Norms:
        """Return the roots of some sums."""
        effect = sqrt(sums.effect)
        # |√(E² + δ) - E| is at most √δ, and at most δ / E.
        root = min(sqrt(sums.square_off), sums.square_off / effect if effect else sums.square_off)
        return cls(
            sqrt(sums.error),
            sqrt(sums.nearest),
            sqrt(sums.within),
            sqrt(sums.steps),
            effect,
            sqrt(sums.error_off),
            sqrt(sums.effect_off) + root,
        )

    @property
    def lost(self) -> str:
        """The share of the effect that is lost, in words."""
        return f"{self.error / self.effect:.0%}" if self.effect else "all"

    def is_lost(self) -> bool:
        """Return True where the stored numbers lose as much of the effect as the nearest would, that is much, and others would
        keep more: the effect is not below the steps of the grid, and not beyond its last numbers.
        """
        is_much = self.within > max(_LOST * self.effect, 4 * self.error_off, self.steps)
        return is_much and self.error + self.error_off >= self.nearest

    def is_much_less(self, beyond: float) -> bool:
        """Return True where `is_lost` is False, whatever the nearest numbers would lose, and whatever is off.

        Where the effect is lost, ``error + off ≥ nearest ≥ within - beyond``, and ``within`` is larger than the share that is much and than
        four times off. So the error is larger than three quarters of that share, less what is beyond.

        Args:
            beyond: how far values are from the last numbers of the grid, all that are beyond them together.
        """
        return self.error <= 0.75 * _LOST * self.effect - beyond

    def is_surely_kept(self) -> bool:
        """Return True where `is_lost` is False, whatever is off, with ``nearest`` and ``within`` known.

        Where the effect is lost, off is less than a quarter of ``within``.
        """
        return self.within <= _LOST * self.effect or self.error <= self.nearest - self.within / 4

    def against(self, record: Survival, sums: Sums, n_rows: int, *, is_whole: bool) -> str:
        """Return what differs from a record, as a sentence; empty where nothing does."""
        for what, found, recorded, off in (
            ("the error of the adapter's effect is", self.error, record.effect_error, self.error_off),
            ("the adapter's effect is", self.effect, record.effect_norm, self.effect_off),
        ):
            room = off + _DIGITS * recorded
            most = recorded + room
            where = f"in {sums.n_rows} of {n_rows} rows"
            if is_whole:
                # Negated, so that NaN is wrong.
                if not abs(found - recorded) <= room:
                    return f"{what} {found:.6g}, expected {recorded:.6g} ± {room:.2g} as recorded"
            elif not found <= most:
                return f"{what} {found:.6g} {where}, expected at most {recorded:.6g}, which is recorded for all rows"
            elif sums.n_rows >= _FEW_ROWS and what.startswith("the error"):
                share = recorded * sqrt(sums.n_rows / n_rows)
                if not found <= _UNLIKE * share + off:
                    return f"{what} {found:.6g} {where}, expected about {share:.2g} by the record of all rows"
        return ""

"""Levels near numbers: the nearest one, and the gap around a number, looked up by the number's leading bits.

The sign, the exponent and the first four bits of the mantissa are a bucket of a number. The levels of E4M3, E5M2 and E2M1, and the
middles between two of them, are at the borders of buckets. So all numbers in a bucket have one answer, and a table of all buckets has
it. The number at the border belongs to the bucket that its answer is from. Levels that are 1 apart need no table. Of all others places
are searched (`lora_merge.checks.searching`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from lora_merge.checks.searching import places, unit_steps

if TYPE_CHECKING:
    import torch  # noqa: TC004 - a field's type, never evaluated

_BITS = 16
_SHIFT = 64 - _BITS
_HALF = 1 << _BITS - 1
_INFINITE = 0x7FF0
"""The bucket of infinity. Those after it have NaN."""


def nearest_level(table: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the nearest level to each number; between two the lower one. For NaN it is any level, or NaN.

    Args:
        table: float64 ``[levels]``, in ascending order.
        numbers: float64, of any shape.
    """
    answers = _answers(table.numpy().tobytes())
    if answers.first is not None:
        below = numbers.floor()
        # A floor and a half is exact, where a difference need not be.
        return below.add_(below + 0.5 < numbers).clamp_(answers.first, answers.first + len(table) - 1)
    if answers.nearest is not None:
        return _looked_up(answers.nearest, numbers, is_upper=True)
    return _taken(table, places((table[:-1] + table[1:]) / 2, numbers))


def gaps(table: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the gap between the two levels that each number is between, of a level the one above it; beyond the last, the last.
    For NaN it is any gap, or NaN.

    Returns:
        Float64, in the shape of the numbers, or broadcast to it.
    """
    answers = _answers(table.numpy().tobytes())
    if answers.first is not None:
        return table.new_ones(())
    if len(table) < 2:
        return table.new_zeros(())
    if answers.gap is not None:
        return _looked_up(answers.gap, numbers, is_upper=False)
    return _taken(table.diff(), _below(table, numbers))


def has_growing_gaps(table: torch.Tensor) -> bool:
    """Return True if gaps only grow on both sides of the smallest: then no number between two others has a larger gap than both."""
    return _answers(table.numpy().tobytes()).grows


@dataclass(frozen=True, slots=True, eq=False)
class _Answers:
    """What is known of a table."""

    first: float | None
    """The first level, where levels are whole and 1 apart."""

    nearest: torch.Tensor | None
    """The nearest level to the numbers of each bucket, float64 ``[buckets]``; None where one bucket has several."""

    gap: torch.Tensor | None
    grows: bool


@lru_cache(maxsize=32)
def _answers(content: bytes) -> _Answers:
    import torch

    table = torch.frombuffer(bytearray(content), dtype=torch.float64)
    if len(table) < 2:
        return _Answers(None, None, None, grows=False)
    widths = table.diff()
    at = int(widths.argmin())
    grows = bool((widths[: at + 1].diff() <= 0).all() and (widths[at:].diff() >= 0).all())
    first = unit_steps(content)
    if first is not None and first.is_integer():
        return _Answers(first, None, None, grows)
    middles = (table[:-1] + table[1:]) / 2
    nearest = [places(middles, end) for end in _ends(is_upper=True)]
    below = [_below(table, end) for end in _ends(is_upper=False)]
    return _Answers(
        None,
        table[nearest[0]] if torch.equal(*nearest) else None,
        widths[below[0]] if torch.equal(*below) else None,
        grows,
    )


def _below(table: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the place of the largest level that is not above each number, and not the last level: the gap above it is the number's."""
    return (places(table, numbers, right=True) - 1).clamp_(0, len(table) - 2)


def _looked_up(answers: torch.Tensor, numbers: torch.Tensor, *, is_upper: bool) -> torch.Tensor:
    """Return the answer for each number. A number at the upper border of a bucket belongs to it, or (not ``is_upper``) to the next."""
    import torch

    # Without a negative zero, which is at the upper border of its bucket.
    bits = (numbers + 0.0).view(torch.int64)
    negative = bits >> 63
    # One unit of the last place nearer to zero: from positive numbers, or from negative ones.
    bits = (bits - 1).sub_(negative) if is_upper else bits.add_(negative)
    return _taken(answers, bits.bitwise_right_shift_(_SHIFT).add_(_HALF))


def _ends(*, is_upper: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and the largest magnitude in each bucket, as `_looked_up` counts them: float64 ``[buckets]``."""
    import torch

    buckets = torch.arange(-_HALF, _HALF)
    near = ((buckets & _HALF - 1).clamp_(max=_INFINITE) << _SHIFT) + ((buckets >= 0) == is_upper)
    magnitudes = torch.stack([near, near + (1 << _SHIFT) - 1]).clamp_(max=_INFINITE << _SHIFT)
    # Of an upper border, zero is in the last bucket of the negative ones, where NaN would be.
    first, last = magnitudes.masked_fill_(buckets == -1, 0).view(torch.float64) * torch.where(
        buckets < 0, -1, 1
    )
    return first, last


def _taken(entries: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the entry at each place. `torch.index_select` takes a quarter of the time of brackets."""
    return entries.index_select(0, index.flatten()).view(index.shape)

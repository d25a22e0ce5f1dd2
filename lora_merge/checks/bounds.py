"""Can a stored value be what a wanted one was rounded to? Asked by limits on both sides, in float64.

What float32 computes for an exact x lies between x - e and x + e, and every rounding here is monotonic. So a stored value is
one of those between what becomes of x - e and what becomes of x + e:

- to the nearest: the nearest numbers to both, with either outcome of a tie. That is half the gap to a neighbour.
- ``stochastic``: the number below x - e, and the one above x + e.
- ``adapter``: x may have been moved by `REACH` steps before, so the nearest numbers to x ± (REACH steps + e).

Beyond the last number of a grid there is only that one: a value that is too large becomes the largest, and no other.

Of codes with scales all this is done with *numbers*, ``(x - bias) / scale + zero``, among the levels of the codes' table. The merge
has them in float32, whose roundings are added to e. Where new scales were made, a library's arithmetic is followed that
quantises models in bfloat16: x is rounded to it first (half a unit of its last place: 2⁻⁸ of x at most), and where scales are stored
in it the quotient is rounded to it as well (2⁻⁸ of the number: for INT8 up to half a step). Both roundings are made here, on both limits.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

from lora_merge.checks.decoding.decoder import FLOAT32, UNDERFLOW
from lora_merge.checks.rounding import neighbours, rounded, step
from lora_merge.checks.searching import places

if TYPE_CHECKING:
    import torch

    from lora_merge.checks.decoding import Levels
    from lora_merge.core.plan import Merge

REACH = 4
"""Steps by which rounding for the adapter may move a value before it becomes the nearest number. A step is the gap between the two
numbers next to the value; of one that is a number itself, the larger of the gaps beside it. It is the promise that
`lora_merge.rounding.bands` states, written down a second time.
"""

_ROUNDINGS = 4 * FLOAT32
"""Of one number in float32: the scale (a product or a quotient of two), a difference, a quotient, a sum."""

_BY_BFLOAT16 = frozenset({"scaled", "fp4", "packed_int", "mxfp4_experts"})
"""Codecs whose new scales follow libraries that quantise models in bfloat16."""


def is_explained(
    op: Merge, stored: Levels, exact: torch.Tensor, off: torch.Tensor, *, is_moved: torch.Tensor
) -> torch.Tensor:
    """Return for each value whether what is stored can have become of it, bool ``[rows, columns]``. NaN never can.

    Where a scale is zero, codes mean nothing, and nothing is said: `is_kept` is for them.

    Args:
        op: what was done.
        stored: what is stored.
        exact: what was wanted, float64 ``[rows, columns]``; off: by how much float32 may have missed it.
        is_moved: bool, broadcast to the values: those that rounding for the adapter may have moved.
    """
    if stored.table is None:
        low, high = _dense_limits(op, exact, off, is_moved)
        return (low <= stored.values) & (stored.values <= high)
    low, high = _numbers(op, stored, exact, off)
    level, table = stored.level, stored.table
    if op.rounding is None and not _has_plain_limits(op):
        found = _is_between(op, table, level, low, high, is_moved)
    else:
        # Most are the nearest number to what was wanted, which every rounding may give: only the others take four searches.
        _, scale, zero, bias = stored.parts
        found = nearest_level(table, (exact - bias) / scale + zero) == level
        left = ~found
        moved = is_moved.expand_as(level)[left]
        found[left] = _is_between(op, table, level[left], low[left], high[left], moved)
    return found & exact.isfinite() & ~low.isnan() & ~high.isnan()


def _is_between(
    op: Merge,
    table: torch.Tensor,
    level: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    is_moved: torch.Tensor,
) -> torch.Tensor:
    """Return for each level whether a number between two limits can have become it; NaN never can."""
    if op.rounding is not None and op.rounding.method == "stochastic":
        first, last = table[_not_above(table, low)], table[_not_below(table, high)]
    else:
        if op.rounding is not None:
            reach = REACH * _step(table, low).maximum(_step(table, high)) * is_moved
            low, high = low - reach, high + reach
        first, last = nearest_level(table, low), nearest_level(table, high, up=True)
    return (first <= level) & (level <= last) & ~low.isnan() & ~high.isnan()


def nearest_level(table: torch.Tensor, numbers: torch.Tensor, *, up: bool = False) -> torch.Tensor:
    """Return the nearest level to each number; between two the lower one, or the upper one."""
    middles = (table[:-1] + table[1:]) / 2
    return table[places(middles, numbers, right=up)]


def nearest_values(op: Merge, stored: Levels, exact: torch.Tensor) -> torch.Tensor:
    """Return what values would be stored as with the same scales if each became the nearest number."""
    import torch

    if stored.table is None:
        return rounded(exact, op.target.dtype)
    _, scale, zero, bias = stored.parts
    levels = nearest_level(stored.table, (exact - bias) / scale + zero)
    return torch.where(scale == 0, stored.values, (levels - zero) * scale + bias)


def gaps_at(op: Merge, stored: Levels, exact: torch.Tensor) -> torch.Tensor:
    """Return the gap between the two numbers beside each value; infinite beyond the last, and where the scale is zero."""
    if stored.table is None:
        return step(exact, op.target.dtype)
    _, scale, zero, bias = stored.parts
    numbers, table = (exact - bias) / scale + zero, stored.table
    is_beyond = ~((numbers >= table[0]) & (numbers <= table[-1]))
    return (_step(table, numbers) * scale.abs()).masked_fill(is_beyond, float("inf"))


def _dense_limits(
    op: Merge, exact: torch.Tensor, off: torch.Tensor, is_moved: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = op.target.dtype
    low, high = exact - off, exact + off
    if op.rounding is None:
        return rounded(low, dtype), rounded(high, dtype)
    if op.rounding.method == "stochastic":
        return neighbours(low, high, dtype)
    reach = REACH * step(low, dtype).maximum(step(high, dtype)) * is_moved
    return rounded(low - reach, dtype), rounded(high + reach, dtype)


def _numbers(
    op: Merge, stored: Levels, exact: torch.Tensor, off: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return between which numbers a value lies among the levels, float64 ``[rows, columns]`` each."""
    import torch

    _, scale, zero, bias = stored.parts
    one, other = (end - bias for end in (exact - off, exact + off))
    plain = one / scale + zero, other / scale + zero
    ends = [*plain]
    if not _has_plain_limits(op):
        quotients = [rounded(end, "BF16") / scale for end in (one, other)]
        if dict(op.target.settings).get("scale") == "BF16":
            quotients = [rounded(rounded(found, "BF16") + zero, "BF16") for found in quotients]
        else:
            quotients = [found + zero for found in quotients]
        # A rounding for the adapter divides the values as they are, but for rows without one.
        ends = quotients if op.rounding is None else [*plain, *quotients]
    low, high = reduce(torch.minimum, ends), reduce(torch.maximum, ends)
    largest = low.abs().maximum(high.abs())
    slack = _ROUNDINGS * (largest + 2 * zero.abs() + (bias / scale).abs()) + UNDERFLOW / scale.abs()
    return low - slack, high + slack


def _has_plain_limits(op: Merge) -> bool:
    """Return True where nothing is rounded to bfloat16 on the way: the quotient itself lies between the limits."""
    return op.on_stored_grid or op.target.codec not in _BY_BFLOAT16


def _step(table: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the gap between the levels that each number lies between. Beyond the last the gaps go on growing, as those of
    floating-point numbers do.
    """
    below = _not_above(table, numbers).clamp(max=len(table) - 2)
    beyond = (numbers - table[-1]).maximum(table[0] - numbers).clamp(min=0)
    return (table[below + 1] - table[below]) * (1 + 2 * beyond / (table[-1] - table[0]))


def _not_above(table: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the place of the largest level that is not above each number; of the first, where all are."""
    return (places(table, numbers, right=True) - 1).clamp_(min=0)


def _not_below(table: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the place of the smallest level that is not below each number; of the last, where all are."""
    return places(table, numbers).clamp_(max=len(table) - 1)

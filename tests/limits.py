"""Can a stored value be what a wanted one was rounded to? The definition, value by value: limits on both sides, without shortcuts.

`lora_merge.checks.bounds` decides most values by one comparison. Its verdicts must be these.
"""

from __future__ import annotations

from functools import reduce

import torch

from lora_merge.checks.decoding.decoder import FLOAT32, UNDERFLOW
from lora_merge.checks.rounding import neighbours, rounded, step

REACH = 4
_ROUNDINGS = 4 * FLOAT32
_BY_BFLOAT16 = frozenset({"scaled", "fp4", "packed_int", "mxfp4_experts"})


def is_explained(op, stored, exact, off, *, is_moved):
    """Return for each value whether what is stored can have become of it, bool ``[rows, columns]``. NaN never can.

    Where a scale is zero, codes mean nothing, and nothing is said: the caller says what must be there.

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
    op,
    table,
    level,
    low,
    high,
    is_moved,
):
    """Return for each level whether a number between two limits can have become it; NaN never can."""
    if op.rounding is not None and op.rounding.method == "stochastic":
        first, last = table[_not_above(table, low)], table[_not_below(table, high)]
    else:
        if op.rounding is not None:
            reach = REACH * _step(table, low).maximum(_step(table, high)) * is_moved
            low, high = low - reach, high + reach
        first, last = nearest_level(table, low), nearest_level(table, high, up=True)
    return (first <= level) & (level <= last) & ~low.isnan() & ~high.isnan()


def nearest_level(table, numbers, *, up: bool = False):
    """Return the nearest level to each number; between two the lower one, or the upper one."""
    middles = (table[:-1] + table[1:]) / 2
    return table[torch.searchsorted(middles, numbers.contiguous(), right=up)]


def nearest_values(op, stored, exact):
    """Return what values would be stored as with the same scales if each became the nearest number."""
    if stored.table is None:
        return rounded(exact, op.target.dtype)
    _, scale, zero, bias = stored.parts
    levels = nearest_level(stored.table, (exact - bias) / scale + zero)
    return torch.where(scale == 0, stored.values, (levels - zero) * scale + bias)


def gaps_at(op, stored, exact):
    """Return the gap between the two numbers beside each value; infinite beyond the last, and where the scale is zero."""
    if stored.table is None:
        return step(exact, op.target.dtype)
    _, scale, zero, bias = stored.parts
    numbers, table = (exact - bias) / scale + zero, stored.table
    is_beyond = ~((numbers >= table[0]) & (numbers <= table[-1]))
    return (_step(table, numbers) * scale.abs()).masked_fill(is_beyond, float("inf"))


def _dense_limits(op, exact, off, is_moved):
    dtype = op.target.dtype
    low, high = exact - off, exact + off
    if op.rounding is None:
        return rounded(low, dtype), rounded(high, dtype)
    if op.rounding.method == "stochastic":
        return neighbours(low, high, dtype)
    reach = REACH * step(low, dtype).maximum(step(high, dtype)) * is_moved
    return rounded(low - reach, dtype), rounded(high + reach, dtype)


def _numbers(op, stored, exact, off):
    """Return between which numbers a value lies among the levels, float64 ``[rows, columns]`` each."""
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


def _has_plain_limits(op):
    """Return True where nothing is rounded to bfloat16 on the way: the quotient itself lies between the limits."""
    return op.on_stored_grid or op.target.codec not in _BY_BFLOAT16


def _step(table, numbers):
    """Return the gap between the levels that each number lies between. Beyond the last the gaps go on growing, as those of
    floating-point numbers do.
    """
    below = _not_above(table, numbers).clamp(max=len(table) - 2)
    beyond = (numbers - table[-1]).maximum(table[0] - numbers).clamp(min=0)
    return (table[below + 1] - table[below]) * (1 + 2 * beyond / (table[-1] - table[0]))


def _not_above(table, numbers):
    """Return the place of the largest level that is not above each number; of the first, where all are."""
    return (torch.searchsorted(table, numbers.contiguous(), right=True) - 1).clamp_(min=0)


def _not_below(table, numbers):
    """Return the place of the smallest level that is not below each number; of the last, where all are."""
    return torch.searchsorted(table, numbers.contiguous()).clamp_(max=len(table) - 1)

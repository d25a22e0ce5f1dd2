"""Places of numbers in a sorted table, by their leading bits: several times as quick as a binary search, whose branches are random.

The sign, the exponent and the first four bits of the mantissa are a bucket of a number. A table of all buckets has the place of the
smallest number in each, and the few entries inside a bucket are compared one by one. The result is that of `torch.searchsorted`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_FEW = 24
"""Entries of a table below which a binary search is as quick."""

_BITS = 16
"""Of a bucket: 1 of the sign, 11 of the exponent, 4 of the mantissa."""

_SHIFT = 64 - _BITS
_LARGEST = 1 << 20
"""Of the entries that are 1 apart: their sums with a half are exact."""

_MOST = 6
"""Entries in one bucket from which on a binary search is quicker."""


def places(table: torch.Tensor, numbers: torch.Tensor, *, right: bool = False) -> torch.Tensor:
    """Return how many entries of a table are below each number; with ``right``, how many are not above it.

    Args:
        table: float64 ``[entries]``, in ascending order.
        numbers: float64, of any shape. NaN counts as larger than all entries.

    Returns:
        Integers, in the shape of the numbers.
    """
    import torch

    steps = unit_steps(table.numpy().tobytes())
    if steps is not None:
        return _by_floor(steps, len(table), numbers, is_right=right)
    if len(table) >= _FEW:
        first, most = _buckets(table.numpy().tobytes(), is_right=right)
        if most <= _MOST:
            return _by_bits(table, numbers.contiguous(), first, most, is_right=right)
    return torch.searchsorted(table, numbers.contiguous(), right=right)


@lru_cache(maxsize=32)
def unit_steps(content: bytes) -> float | None:
    """Return the first entry of a table whose entries are 1 apart, all of them whole or all of them halves; else None."""
    import torch

    table = torch.frombuffer(bytearray(content), dtype=torch.float64) if content else torch.empty(0)
    first = float(table[0]) if len(table) else 0.0
    if not len(table) or abs(first) > _LARGEST or not (2 * first).is_integer():
        return None
    return first if torch.equal(table, first + torch.arange(len(table), dtype=torch.float64)) else None


def _by_floor(first: float, n: int, numbers: torch.Tensor, *, is_right: bool) -> torch.Tensor:
    """Return the places in a table of ``n`` entries from ``first`` on that are 1 apart."""
    below = numbers.floor()
    # Floor plus a half is exact, where a difference of number and half need not be.
    entry = below if first.is_integer() else below + 0.5
    is_past = entry <= numbers if is_right else entry < numbers
    start = first if first.is_integer() else first - 0.5
    found = below.sub_(start).add_(is_past).nan_to_num_(nan=n)
    return found.clamp_(0, n).long()


def _by_bits(
    table: torch.Tensor, numbers: torch.Tensor, first: torch.Tensor, most: int, *, is_right: bool
) -> torch.Tensor:
    import torch

    flat = numbers.view(-1)
    buckets = (flat.view(torch.int64) >> _SHIFT).bitwise_and_((1 << _BITS) - 1)
    found = first.index_select(0, buckets)
    ends = torch.cat([table, table.new_full((most,), float("inf"))])
    for _ in range(most):
        entry = ends.index_select(0, found)
        found += entry <= flat if is_right else entry < flat
    # An entry at infinity is none: numbers that are infinite stop at the end.
    return found.clamp_(max=len(table)).view(numbers.shape)


@lru_cache(maxsize=32)
def _buckets(content: bytes, *, is_right: bool) -> tuple[torch.Tensor, int]:
    """Return the place of the smallest number of each bucket, int64 ``[buckets]``, and the most entries of one bucket."""
    import torch

    table = torch.frombuffer(bytearray(content), dtype=torch.float64)
    starts = torch.arange(1 << _BITS, dtype=torch.int64) << _SHIFT
    near = starts.view(torch.float64)
    far = (starts | ((1 << _SHIFT) - 1)).view(torch.float64)
    low, high = torch.where(near.signbit(), far, near), torch.where(near.signbit(), near, far)
    # The buckets of infinity have some NaN too, which no quotient has: all others begin with another bit.
    low = torch.where(near.isinf(), near, low).nan_to_num(nan=float("inf"))
    high = torch.where(near.isinf(), near, high).nan_to_num(nan=float("inf"))
    first = torch.searchsorted(table, low, right=is_right)
    last = torch.searchsorted(table, high, right=is_right)
    # An infinite entry could not be told from the numbers behind the last one.
    return first, int((last - first).max()) if table.isfinite().all() else _MOST + 1

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

from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TYPE_CHECKING

from lora_merge.checks.decoding.decoder import FLOAT32, UNDERFLOW
from lora_merge.checks.nearing import gaps, has_growing_gaps, nearest_level
from lora_merge.checks.rounding import neighbours, rounded, step
from lora_merge.checks.searching import places

if TYPE_CHECKING:
    import torch  # noqa: TC004 - a field's type, never evaluated

    from lora_merge.checks.decoding import Levels  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.core.plan import Merge  # noqa: TC004 - a field's type, never evaluated

REACH = 4
"""Steps by which rounding for the adapter may move a value before it becomes the nearest number. A step is the gap between the two
numbers next to the value; of one that is a number itself, the larger of the gaps beside it. It is the promise that
`lora_merge.rounding.bands` states, written down a second time.
"""

_SURELY = REACH - 2.0**-10
"""Steps that are within the reach, whatever the roundings of float64 on the way."""

_ROUNDINGS = 4 * FLOAT32
"""Of one number in float32: the scale (a product or a quotient of two), a difference, a quotient, a sum."""

_BY_BFLOAT16 = frozenset({"scaled", "fp4", "packed_int", "mxfp4_experts"})
"""Codecs whose new scales follow libraries that quantise models in bfloat16."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """What some stored values should be. What several questions need is computed once.

    Args:
        op: what was done.
        stored: what is stored.
        exact: what was wanted, float64 ``[rows, columns]``.
        off: by how much float32 may have missed it.
    """

    op: Merge
    stored: Levels
    exact: torch.Tensor
    off: torch.Tensor

    @cached_property
    def numbers(self) -> torch.Tensor:
        """What was wanted, among the levels. It is not finite where the scale is zero."""
        return self.stored.numbers(self.exact)

    @cached_property
    def _level(self) -> torch.Tensor:
        """The nearest level to each number."""
        assert self.stored.table is not None
        return nearest_level(self.stored.table, self.numbers)

    @cached_property
    def _gaps(self) -> torch.Tensor:
        """The gap between the levels beside each number."""
        assert self.stored.table is not None
        return gaps(self.stored.table, self.numbers)

    def is_explained(self, is_moved: torch.Tensor) -> torch.Tensor:
        """Return for each value whether what is stored can have become of it, bool ``[rows, columns]``. NaN never can.

        Where a scale is zero, codes mean nothing, and no value is explained: the caller says what must be there.

        Args:
            is_moved: bool, broadcast to the values: those that rounding for the adapter may have moved.
        """
        if self.stored.table is None:
            low, high = _dense_limits(self.op, self.exact, self.off, is_moved)
            return (low <= self.stored.level) & (self.stored.level <= high)
        found = self._is_surely(is_moved)
        if found.all():
            return found
        left = (~found).nonzero(as_tuple=True)
        moved = is_moved.expand_as(found)[left]
        found[left] = _is_explained(
            self.op, self.stored.at(left), self.exact[left], self.off[left], is_moved=moved
        )
        return found

    def _is_surely(self, is_moved: torch.Tensor) -> torch.Tensor:
        """Return for each coded value whether one comparison proves that it is explained: it is for most.

        A number between the limits has the stored level as its nearest, so the limits are on both sides of the level: it is a
        finite number, and what it was made from is finite too. Of a rounding for the adapter the number may be moved to the level
        itself, since the steps at the limits are at least as large as the gap between them.
        """
        op, table, level = self.op, self.stored.table, self.stored.level
        assert table is not None
        number = self.numbers
        if op.rounding is None and not _has_plain_limits(op):
            number = _by_bfloat16(op, self.stored, self.exact)
            found = nearest_level(table, number) == level
        elif op.rounding is not None and op.rounding.method == "adapter" and has_growing_gaps(table):
            found = (level - number).abs_() <= self._gaps * _SURELY
            if not is_moved.all():
                found = found & is_moved | (self._level == level)
        else:
            found = self._level == level
        for part in (number, self.off, self.stored.scale):
            # A sum is not finite if one of its values is not.
            if not isinstance(part, float) and not part.sum().isfinite():
                found &= part.isfinite()
        return found

    def nearest(self) -> torch.Tensor:
        """Return what would be stored with the same scales if each value became the nearest number."""
        import torch

        stored = self.stored
        if stored.table is None:
            return rounded(self.exact, self.op.target.dtype)
        found = stored.meant(self._level)
        scale = torch.as_tensor(stored.scale)
        return found if scale.all() else torch.where(scale == 0, stored.values, found)

    def steps(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the gap between the two numbers beside each value, and for codes which values have two: 1.0 for them, 0.0 beyond the
        last number, and where the scale is zero.
        """
        if self.stored.table is None:
            return step(self.exact, self.op.target.dtype), None
        first, last = self.stored.table[0], self.stored.table[-1]
        inside = self.numbers.clamp(first, last).eq(self.numbers).double()
        return (self._gaps * self.stored.scale).abs(), inside


def _is_explained(
    op: Merge, stored: Levels, exact: torch.Tensor, off: torch.Tensor, *, is_moved: torch.Tensor
) -> torch.Tensor:
    """Return for each coded value whether what is stored can have become of it, by limits on both sides."""
    assert stored.table is not None
    low, high = _numbers(op, stored, exact, off)
    found = _is_between(op, stored.table, stored.level, low, high, is_moved)
    if op.rounding is not None or _has_plain_limits(op):
        found |= _nearest(stored.table, stored.numbers(exact)) == stored.level
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
        first, last = _nearest(table, low), _nearest(table, high, up=True)
    return (first <= level) & (level <= last) & ~low.isnan() & ~high.isnan()


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
    ends = exact - off, exact + off
    found = [stored.numbers(end) for end in ends]
    if not _has_plain_limits(op):
        quotients = [_by_bfloat16(op, stored, end) for end in ends]
        # A rounding for the adapter divides the values as they are, but for rows without one.
        found = quotients if op.rounding is None else [*found, *quotients]
    low, high = reduce(torch.minimum, found), reduce(torch.maximum, found)
    largest = low.abs().maximum(high.abs())
    slack = _ROUNDINGS * (largest + 2 * zero.abs() + (bias / scale).abs()) + UNDERFLOW / scale.abs()
    return low - slack, high + slack


def _by_bfloat16(op: Merge, stored: Levels, values: torch.Tensor) -> torch.Tensor:
    """Return the numbers of some values among the levels, computed as a library does that quantises in bfloat16."""
    quotient = rounded(values - stored.bias, "BF16") / stored.scale
    if dict(op.target.settings).get("scale") != "BF16":
        return quotient + stored.zero
    return rounded(rounded(quotient, "BF16") + stored.zero, "BF16")


def _has_plain_limits(op: Merge) -> bool:
    """Return True where nothing is rounded to bfloat16 on the way: the quotient itself lies between the limits."""
    return op.on_stored_grid or op.target.codec not in _BY_BFLOAT16


def _nearest(table: torch.Tensor, numbers: torch.Tensor, *, up: bool = False) -> torch.Tensor:
    """Return the nearest level to each number; between two the lower one, or the upper one. NaN counts as larger than all."""
    middles = (table[:-1] + table[1:]) / 2
    return table[places(middles, numbers, right=up)]


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

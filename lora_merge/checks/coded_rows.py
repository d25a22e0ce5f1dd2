"""Rows of a frequent merge of quantised weights, recomputed without torch: one product added to codes, whose scales stay as they are.

It says yes, or that it does not know. Then `lora_merge.checks.recompute` asks its formulas, and says what is wrong. What is asked is
what `lora_merge.checks.bounds` and `lora_merge.checks.effect` ask:

- A value becomes the nearest level, or with a rounding for the adapter the one nearest to a value that is `REACH` steps away at most. So
  for each code there are two limits that its value, divided by its scale, is between. Most are, whatever float32 may have missed; of
  the few others that is computed.
- The rounding may do to the adapter's effect what is recorded of it (`lora_merge.checks.kept`).
"""

from __future__ import annotations

import sys
from functools import lru_cache
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_merge.checks.bounds import REACH
from lora_merge.checks.decoding.by_code import coded_rows, coding_of
from lora_merge.checks.decoding.decoder import FLOAT32, UNDERFLOW
from lora_merge.checks.expecting import is_one_product
from lora_merge.checks.kept import ProductRows
from lora_merge.runtime.shortage import BLAS_BYTES, need_room

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from lora_merge.checks.decoding.by_code import Coded, Coding
    from lora_merge.checks.reading import Reader
    from lora_merge.core.plan import Merge
    from lora_merge.core.weight import Weight

    Wide = np.ndarray[Any, np.dtype[np.float64]]

_SURELY = REACH - 2.0**-10
"""Steps that are within the reach, whatever the roundings of float64 on the way."""

_ROUNDINGS = 4 * FLOAT32
"""Of one number in float32, as in `lora_merge.checks.bounds`."""

_SMALLEST = 2.0**-149
"""The smallest subnormal of float32."""

_FEW = 1 / 64
"""The most values, of all, that are looked at one by one."""


class _Rows(NamedTuple):
    """Some rows of a weight.

    Shapes:
        before: what the base has, ``[rows, columns]``; change: what is added; left: rows of B; scales: of the output, as `before`;
        codes: the same.
    """

    before: Wide
    change: Wide
    left: Wide
    scales: Wide
    codes: np.ndarray[Any, np.dtype[np.uint8]]


class CodedRows(ProductRows):
    """The rows of one merged weight whose codes keep their scales."""

    def __init__(self, reader: Reader, op: Merge, written: Weight) -> None:
        super().__init__(reader, op, written)
        coding = coding_of(op.target, op.source.shape)
        assert coding is not None
        self._coding: Coding = coding

    @staticmethod
    def applies(op: Merge) -> bool:
        """Return whether the rows of a weight can be recomputed here."""
        return op.on_stored_grid and is_one_product(op) and coding_of(op.target, op.source.shape) is not None

    def are_explained(self, rows: Sequence[int]) -> bool:
        """Return True where rounding explains every stored value of some rows; False where that is not known."""
        import numpy as np

        # What is not finite is not explained.
        with np.errstate(all="ignore"):
            read = self._read(rows) if self._is_ready() else None
            if read is None:
                return False
            wanted = read.before + read.change
            numbers = wanted / read.scales
            low, high = limits(self._coding.meaning, is_adapter=self._is_adapter)
            is_right = (low[read.codes] <= numbers) & (numbers <= high[read.codes])
            if not is_right.all() and not self._are_near(read, numbers, np.nonzero(~is_right)):
                return False
            meaning = self._coding.meaning
            error = _table(meaning)[read.codes] * read.scales - wanted
            beyond = _beyond(numbers, read.scales, meaning) if self._is_adapter else 0.0
            assert self._kept is not None
            self._kept.add(read.change, error, lambda: _others(read, numbers, meaning), beyond)
            return True

    def _read(self, rows: Sequence[int]) -> _Rows | None:
        """Return some rows; None where one of the files has them in another form."""
        import numpy as np

        op, reader, coding = self._op, self._reader, self._coding
        (delta,) = op.deltas
        before = coded_rows(reader.bytes_source, op.source, coding, rows)
        stored = coded_rows(reader.bytes_rows, self._written, coding, rows)
        left = reader.floats_source(delta.factors["B"], rows, op.view.n_rows)
        if before is None or stored is None or left is None:
            return None
        wide = left.astype(np.float64)
        need_room(BLAS_BYTES, "multiply matrices")
        assert self._factor is not None
        change = (wide @ self._factor.a) * delta.effective_scale
        values = _table(coding.meaning)[before.codes] * _spread(before, coding)
        return _Rows(values, change, wide, _spread(stored, coding), stored.codes)

    def _are_near(self, read: _Rows, numbers: Wide, places: tuple[Any, ...]) -> bool:
        """Return whether values are between their limits but for what float32 may have missed.

        Args:
            read: their rows.
            numbers: all values of these, divided by their scales.
            places: rows and columns of the values that are asked.
        """
        import numpy as np

        rows, columns = places
        if len(rows) > numbers.size * _FEW:
            return False
        number, before, change, scale = (
            part[places] for part in (numbers, read.before, read.change, read.scales)
        )
        assert self._factor is not None
        factor, rank = abs(self._op.deltas[0].effective_scale), len(self._factor.a)
        # The product is off by (r + 5)·2⁻²⁴·|s|·Σ|bᵢaᵢ| at most, and by its underflows; a sum by 2⁻²⁴ of the sizes of its parts.
        off = np.einsum("nr,rn->n", np.abs(read.left[rows]), self._factor.sizes[:, columns])
        off *= (rank + 5) * FLOAT32 * factor
        off += (factor * rank + 2) * _SMALLEST
        off += (np.abs(before) + np.abs(change)) * FLOAT32
        off += self._coding.n_products * (np.abs(before) * FLOAT32 + UNDERFLOW)
        off = off / scale + _ROUNDINGS * np.abs(number) + UNDERFLOW / scale
        low, high = (
            limit[read.codes[places]] for limit in limits(self._coding.meaning, is_adapter=self._is_adapter)
        )
        return bool(((low - off <= number) & (number <= high + off) & np.isfinite(number)).all())


def _spread(coded: Coded, coding: Coding) -> Wide:
    """Return the scale of each value."""
    import numpy as np

    width = coded.codes.shape[1]
    found: Wide = np.repeat(coded.scales, coding.group or width, 1)[:, :width]
    return found


def _others(read: _Rows, numbers: Wide, meaning: tuple[float, ...]) -> tuple[Wide, Wide]:
    """Return what the nearest levels would add to the values, of all of them, and of those alone that have levels on both sides.

    Args:
        read: the rows.
        numbers: their values, divided by their scales.
        meaning: of the codes.
    """
    import numpy as np

    levels, (low, high) = np.array(_levels(meaning)), limits(meaning, is_adapter=False)
    found = _table(meaning)[read.codes]
    # Most values became the nearest level anyway.
    places = np.nonzero(~((low[read.codes] <= numbers) & (numbers <= high[read.codes])))
    found[places] = levels[np.searchsorted((levels[:-1] + levels[1:]) / 2, numbers[places])]
    nearest: Wide = (found - numbers) * read.scales
    return nearest, np.where((levels[0] <= numbers) & (numbers <= levels[-1]), nearest, 0.0)


def _beyond(numbers: Wide, scales: Wide, meaning: tuple[float, ...]) -> float:
    """Return the squares of the distances of values from the last levels, those beyond them."""
    import numpy as np

    levels = _levels(meaning)
    places = np.nonzero((numbers < levels[0]) | (numbers > levels[-1]))
    number = numbers[places]
    return float(np.square((number - np.clip(number, levels[0], levels[-1])) * scales[places]).sum())


@lru_cache
def _table(meaning: tuple[float, ...]) -> Wide:
    import numpy as np

    return np.array(meaning)


@lru_cache
def _levels(meaning: tuple[float, ...]) -> tuple[float, ...]:
    """Return all levels in order."""
    return tuple(sorted({value + 0.0 for value in meaning if isfinite(value)}))


@lru_cache
def limits(meaning: tuple[float, ...], *, is_adapter: bool) -> tuple[Wide, Wide]:
    """Return between which numbers those are that may have become each code; NaN for codes without a level: float64 ``[codes]`` each."""
    import numpy as np

    levels = _levels(meaning)
    ends = {level: _ends(levels, n, is_adapter=is_adapter) for n, level in enumerate(levels)}
    low, high = np.array([ends.get(value, (np.nan, np.nan)) for value in meaning]).T
    return low, high


def _ends(levels: tuple[float, ...], n: int, *, is_adapter: bool) -> tuple[float, float]:
    """Return the smallest number and the largest that may become level n."""
    if is_adapter:
        mirrored = tuple(-level for level in reversed(levels))
        return -_reach(mirrored, len(levels) - 1 - n), _reach(levels, n)
    below = (levels[n - 1] + levels[n]) / 2 if n else -sys.float_info.max
    above = (levels[n] + levels[n + 1]) / 2 if n + 1 < len(levels) else sys.float_info.max
    return below, above


def _reach(levels: tuple[float, ...], n: int) -> float:
    """Return up to which number all from level n on become that level when they are moved by `_SURELY` steps and are rounded then. A step
    is the gap that a number is in.
    """
    if n + 1 == len(levels):
        # What is too large becomes the last.
        return sys.float_info.max
    middle, end = (levels[n] + levels[n + 1]) / 2, levels[n]
    for lower, upper in pairwise(levels[n:]):
        end = middle + _SURELY * (upper - lower)
        if end < upper:
            return max(lower, end)
    # Beyond the last level steps are as large as the last one.
    return end

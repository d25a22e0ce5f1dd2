"""Checks part of every row of a merged tensor while it passes: random projections of what was read and of what is written.

For random x and any matrices, ``(W + sBA)x = Wx + sB(Ax)``, and the right-hand side costs next to nothing (Freivalds, 1977).
A row has up to four products, each of 64 adjacent values (`Pattern`). The other columns of the row are not looked at. A row
of the output that is wrong in those columns differs in the products, by weights that were not chosen for it. What may differ is what rounding makes of it. With u the
unit roundoff of the stored dtype, a row w is off by about ``0.43 u ‖w‖``: up to half a unit in the last place of each
element, for mantissas that are spread logarithmically; float32 sums add to that. Of k products the squares add up to
chi-squared, which is beyond ``k + 2√(kt) + 2t`` once in exp(t) rows (Laurent and Massart, 2000). Rows beyond that, for
t = 18, are *suspects*. Verification recomputes them from the files, element by element: the bound decides what is looked at,
not what is wrong.
"""

from __future__ import annotations

from math import isfinite, nan, sqrt
from typing import TYPE_CHECKING, Any

from lora_merge.checks.expecting import Expected, Weights, expect, manner_of
from lora_merge.checks.weighing import (
    CompiledViews,
    Pattern,
    TileViews,
    views_of,
    weights_of,
)
from lora_merge.core.tensor import UNIT_ROUNDOFF

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from lora_merge.checks.weighing import Numbers
    from lora_merge.core.plan import Merge
    from lora_merge.core.tensor import TensorRef

    Mask = np.ndarray[Any, np.dtype[np.bool_]]

_RARE = 18.0
"""The t above: without a fault, one row in exp(18), or 6·10⁷, is suspect."""

_ROUNDING = {"nearest": 0.5, "stochastic": 0.75, "adapter": 1.5}
"""Rounding error of a row, in u ‖w‖: 0.43, and some room for mantissas with another distribution. At random it is √2 times that, and
for the adapter up to three times, in narrow matrices."""

_WEIGHT = 1.01
"""Root mean square of the weights."""

_FLOAT32 = 2.0**-24

_LENGTH_OFF = 0.01
"""Relative difference that is allowed between a DoRA row's length and its magnitude."""

_RANK = 256
"""The longest float32 sum in the merge itself: the rank."""

_FLOOR = {"BF16": 2.0**-126, "F16": 2.0**-24, "F32": 2.0**-126}
"""Size below which an element counts as zero, by dtype."""

_SMALLEST = 2.0**-40
"""Smallest size of a row's products: squares of much smaller ones underflow in float32."""

_FEW = 0.01
"""The largest share of rows that are suspect because they did not change at all."""

_MOST_RANGES = 256


class Projection:
    """The projections of one tensor, taken tile by tile, in order.

    Args:
        op: what is done to the tensor.
        slot: where it goes.
        tiles: its row ranges.
    """

    def __init__(self, op: Merge, slot: TensorRef, tiles: Sequence[tuple[int, int]]) -> None:
        import numpy as np

        self._op, self._slot, self._tiles = op, slot, tiles
        self.manner = manner_of(op)
        self.pattern = Pattern.of(slot.name, op.view.columns, op.source.dtype, slot.dtype)
        self._x = weights_of(slot.name, self.pattern.taken)
        n_rows, k = op.view.n_rows, self.pattern.groups
        self._products = np.empty((2, n_rows, k), np.float32)
        self._norms = np.empty(n_rows, np.float32)

    def views(self, content: memoryview, rows: int, dtype: str) -> TileViews | CompiledViews:
        """Return views of a buffer for `before` and `after`. They can be used for every tile of that shape."""
        # DoRA fixes the length of whole rows, so they are measured whole; else one group of columns stands for the row.
        return views_of(content, rows, dtype, self.pattern, whole=self.manner == "directions")

    def before(self, n: int, views: TileViews | CompiledViews) -> None:
        """Project a tile as it was read."""
        views.project(self._x, self._products[0, slice(*self._tiles[n])])

    def after(self, n: int, views: TileViews | CompiledViews) -> None:
        """Project a tile as it is written, and take the lengths of its rows."""
        rows = slice(*self._tiles[n])
        views.project(self._x, self._products[1, rows], self._norms[rows])

    def suspects(self) -> tuple[tuple[int, int], ...] | None:
        """Return the suspect rows as ranges, once all tiles have passed; None where nothing can be said.

        Raises:
            CheckpointError: a factor cannot be read.
        """
        import numpy as np

        if not self.manner or not self._tiles:
            return None
        # What is not finite is suspect, and no news to be warned of.
        with np.errstate(all="ignore"):
            size = _median(_norms(self._products[1]))
            # Products that are nearly all zero say nothing in float32.
            if size < _SMALLEST:
                return None
            return _ranges(self._rows_off(expect(self._op, Weights(self.pattern, self._x)), size))

    def _rows_off(self, expected: Expected, size: float) -> Mask:
        """Return a mask of the suspect rows.

        Args:
            expected: what must become of the products.
            size: the median norm of a row's products as it is written.
        """
        import numpy as np

        (before, after), changes = self._products, _norms(expected.change)
        limit = self._limit(expected, changes, size)
        if self.manner == "sums":
            moved = after - before
            same = _norms(moved) == 0
            if expected.taken is not None:
                moved += expected.taken[:, None] * before
            # Negated, so that NaN is suspect.
            off: Mask = ~(_norms(moved - expected.change) <= limit) | np.isinf(limit)
            # Rows that stayed as they were: few of them may have been missed by the merge; many were lost to rounding.
            same &= changes != 0
            return off | same if int(same.sum()) <= max(1, _FEW * len(same)) else off
        wanted = before + expected.change
        if self.manner == "sizes":
            return ~(_norms(after - wanted) <= limit) | np.isinf(limit)
        own, lengths = ~np.isnan(expected.lengths), np.abs(expected.lengths)
        # Only the direction is compared here: the factor that brings both closest is taken out.
        factor = (after * wanted).sum(1) / np.square(wanted).sum(1)
        wanted *= np.where(own, factor, np.float32(1))[:, None]
        off = ~(_norms(after - wanted) <= limit) | np.isinf(limit)
        return off | (own & ~(np.abs(self._norms - lengths) <= _LENGTH_OFF * lengths))

    def _limit(self, expected: Expected, changes: Numbers, size: float) -> Numbers:
        """Return the largest difference of a row's products that rounding explains: the root of the sum of their
        squares.
        """
        import numpy as np

        k, taken = self.pattern.groups, self.pattern.taken
        squares, changes = self._squares(size), np.square(changes)
        rounding = squares.copy()
        if (
            self.pattern.halved
        ):  # the lower half of a view's mantissa is another value, and that may have changed too
            rounding += 2 * np.minimum(changes, squares)
        if any(delta.rounded for delta in self._op.deltas):
            rounding += changes
        method = "nearest" if self._op.rounding is None else self._op.rounding.method
        noise = rounding * (_ROUNDING[method] * UNIT_ROUNDOFF[self._slot.dtype]) ** 2
        # Float32 sums over `taken` values here, and over the rank in the merge.
        noise += (squares + np.square(_norms(self._products[0])) + changes) * (_FLOAT32**2 * (taken + _RANK))
        noise += _FLOOR[self._slot.dtype] ** 2 * k * taken
        noise *= _WEIGHT**2 * (1 + 2 * sqrt(_RARE / k) + 2 * _RARE / k)
        # Six standard deviations of what random weights make of a change of this size.
        found: Numbers = np.sqrt(noise) + 6 * _WEIGHT * expected.spread
        return found

    def _squares(self, size: float) -> Numbers:
        """Return ‖w‖² of each row as it is written, over the columns that are multiplied; measured in one group of
        columns.
        """
        import numpy as np

        squares: Numbers = np.square(self._norms)
        if self.manner == "directions":
            return squares * (self.pattern.groups * self.pattern.taken / self.pattern.columns)
        if self.pattern.groups == 1:
            return squares
        ratio = size**2 / (_median(squares) or nan)
        return squares * (
            min(max(ratio, self.pattern.groups / 16), self.pattern.groups * 16.0) if isfinite(ratio) else 1
        )


def _norms(rows: Numbers) -> Numbers:
    """Return the norms of rows in float32; infinite or zero where a square is."""
    import numpy as np

    found: Numbers = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return found


def _median(values: Numbers) -> float:
    """Return the median; of two in the middle the lower one."""
    import numpy as np

    middle = (len(values) - 1) // 2
    return float(np.partition(values, middle)[middle])


def _ranges(rows: Mask) -> tuple[tuple[int, int], ...]:
    """Return the marked rows as ranges; one range of all rows where there would be too many."""
    found: list[tuple[int, int]] = []
    for row in rows.nonzero()[0].tolist():
        if found and found[-1][1] == row:
            found[-1] = (found[-1][0], row + 1)
        else:
            found.append((row, row + 1))
    # The record of a tensor stays small.
    return tuple(found) if len(found) <= _MOST_RANGES else ((0, len(rows)),)

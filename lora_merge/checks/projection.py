"""Every row of a merged tensor, checked in passing: random projections of what was read and of what is written.

For random x and any matrices, ``(W + sBA)x = Wx + sB(Ax)``, and the right-hand side costs next to nothing (Freivalds, 1977).
A row has one product for every 128 columns or so. A row of the output that is not what it should be differs in them, by
weights that were not chosen for it. What may differ is what rounding makes of it. With u the unit roundoff of the stored
dtype, a row w is off by about ``0.43 u ‖w‖``: up to half a unit in the last place of each element, for mantissas that are
spread logarithmically; float32 sums add to that. Of k products the squares add up to chi-squared, which is beyond
``k + 2√(kt) + 2t`` once in exp(t) rows (Laurent and Massart, 2000). Rows beyond that, for t = 18, are *suspects*.
Verification recomputes them from the files, element by element: the bound decides what is looked at, not what is wrong.

In BF16 these are the odd columns. The even ones of a tile's rows are added up by signs, in one tile of four; where such sums
are off by 1.5 times what rounding explains, the tile is suspect as a whole.
"""

from __future__ import annotations

import zlib
from math import isfinite, sqrt
from typing import TYPE_CHECKING

from lora_merge.checks.expecting import Expected, Weights, expect, manner_of, replaced_rows
from lora_merge.checks.weighing import (
    SEGMENT,
    Flushing,
    TileViews,
    has_subnormals,
    is_halved,
    n_groups,
    weights_of,
)
from lora_merge.core.tensor import UNIT_ROUNDOFF

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lora_merge.core.plan import Merge
    from lora_merge.core.tensor import TensorRef

SUMMED_EVERY = 4
"""One tile in so many has its rows added up."""

TILE_RATIO = 1.5
"""A tile is suspect where its sums are off by so many times what rounding does to them."""

_RARE = 18.0
"""One row in exp(18), or 6·10⁷, would be suspect without a fault."""

_ROUNDING = 0.5
"""What rounding does to a row, in u ‖w‖: 0.43, and some room for mantissas that are spread otherwise."""

_WEIGHT = 1.01
"""Root mean square of the weights."""

_FLOAT32 = 2.0**-24

_LENGTH_OFF = 0.02
"""By how much a row of DoRA may seem longer or shorter than its magnitude: views of BF16 are off by less than 2⁻⁷."""

_FLOOR = {"BF16": 2.0**-126, "F16": 2.0**-24, "F32": 2.0**-126}
"""Of each element: what is not told from zero."""

_SMALLEST = 2.0**-40
"""Of the products of a row: the squares of such that are much smaller are lost in float32."""

_FEW = 0.01
"""Share of the rows that are looked at again for being what they were."""

_MOST_RANGES = 256


class Projection:
    """The projections of one tensor, made tile by tile, in order.

    Args:
        op: what is done to the tensor.
        slot: where it goes.
        tiles: its row ranges.
    """

    def __init__(self, op: Merge, slot: TensorRef, tiles: Sequence[tuple[int, int]]) -> None:
        import torch

        self._op, self._slot, self._tiles = op, slot, tiles
        self.manner = manner_of(op)
        n_rows, columns = op.view.n_rows, op.view.columns
        self.halved = is_halved(columns, op.parts[0].dtype, slot.dtype)
        self._flushing = Flushing(wanted=self.halved and has_subnormals())
        self._n_columns = columns // 2 if self.halved else columns
        self._k = n_groups(self._n_columns)
        self._x = weights_of(slot.name, self._n_columns // self._k)
        self._signs = weights_of(f"{slot.name}/rows", n_rows).sign()
        if replaced := replaced_rows(op):
            self._signs[replaced] = 0
        drawn = zlib.crc32(slot.name.encode()) % SUMMED_EVERY % max(len(tiles), 1)
        is_summed = self.halved and self.manner == "sums"
        self._summed = range(drawn, len(tiles) if is_summed else 0, SUMMED_EVERY)
        self._before, self._after = torch.empty(2, n_rows, self._k)
        n_even = columns // 2 - 1 if self.halved else 0
        self._sums = torch.empty(2, len(self._summed), n_even)
        self._all_sums, self._first = torch.zeros(1, n_even), torch.zeros(n_rows)
        self._lengths = torch.empty(n_rows)
        sizes = [end - start for start, end in tiles]
        groups = [size * self._k for size in sizes]
        self._before_of, self._after_of = (
            self._before.view(-1).split_with_sizes(groups),
            self._after.view(-1).split_with_sizes(groups),
        )
        self._signs_of = self._signs[None].split_with_sizes(sizes, 1)
        self._first_of, self._lengths_of = (
            self._first.split_with_sizes(sizes),
            self._lengths.split_with_sizes(sizes),
        )

    def views(self, content: memoryview, rows: int, dtype: str) -> TileViews:
        """Return what a buffer is looked at through; it may be used again for every tile of its shape."""
        return TileViews(content, rows, self._op.view.columns, dtype, halved=self.halved, width=len(self._x))

    def before(self, n: int, views: TileViews) -> None:
        """Take in a tile as it was read."""
        import torch

        views.refresh()
        with self._flushing:
            torch.mv(views.groups, self._x, out=self._before_of[n])
            if n in self._summed and views.even is not None:
                torch.mm(self._signs_of[n], views.even, out=self._sums[0, n // SUMMED_EVERY][None])

    def after(self, n: int, views: TileViews) -> None:
        """Take in a tile as it is written."""
        import torch

        views.refresh()
        with self._flushing:
            torch.mv(views.groups, self._x, out=self._after_of[n])
            if views.even is not None:
                if n in self._summed:
                    sums = self._sums[1, n // SUMMED_EVERY][None]
                    self._all_sums += torch.mm(self._signs_of[n], views.even, out=sums)
                else:
                    torch.addmm(self._all_sums, self._signs_of[n], views.even, out=self._all_sums)
                self._first_of[n].copy_(views.first)
            if self.manner == "directions":
                self._lengths_of[n].copy_(_lengths(views))
            else:
                torch.linalg.vector_norm(views.segment, dim=1, out=self._lengths_of[n])

    def is_finite(self) -> bool:
        """Return True when every value that was written is known to be finite: every one of them is in a sum."""
        return isfinite(float(self._after.sum() + self._all_sums.sum() + self._first.sum()))

    def suspects(self) -> tuple[tuple[int, int], ...] | None:
        """Return the rows to be looked at again, as ranges, once all tiles are through; None where nothing can be said.

        Raises:
            CheckpointError: a factor cannot be read.
        """
        if not self.manner or not self._tiles or float(_norms(self._after).median()) < _SMALLEST:
            return None
        tiles = [self._tiles[n] for n in self._summed]
        weights = Weights(self._op.view.columns, self._k, self._x, self.halved, self._signs, tiles)
        expected = expect(self._op, self._slot, weights)
        off = self._rows_off(expected)
        for n in self._tiles_off(expected).nonzero().flatten().tolist():
            start, end = tiles[n]
            if not off[start:end].any():
                off[start:end] = True
        return _ranges(off)

    def _rows_off(self, expected: Expected) -> torch.Tensor:
        """Return which rows are suspect."""
        changes = _norms(expected.change)
        limit = self._limit(expected, changes)
        if self.manner == "sums":
            moved = self._after - self._before
            same = _norms(moved) == 0
            if expected.taken is not None:
                moved += expected.taken[:, None] * self._before
            off = ~(_norms(moved - expected.change) <= limit) | limit.isinf()
            same &= changes != 0
            return off | same if int(same.sum()) <= max(1, _FEW * len(same)) else off
        wanted = self._before + expected.change
        if self.manner == "directions":
            own = ~expected.lengths.isnan()
            factor = (self._after * wanted).sum(1) / wanted.square().sum(1)
            wanted *= factor.where(own, factor.new_ones(()))[:, None]
        off = ~(_norms(self._after - wanted) <= limit) | limit.isinf()
        if self.manner == "directions":
            lengths = expected.lengths.abs()
            return off | (own & ~((self._lengths - lengths).abs() <= _LENGTH_OFF * lengths))
        return off

    def _limit(self, expected: Expected, lengths: torch.Tensor) -> torch.Tensor:
        """Return by how much a row's products may be off, as the root of their squares' sum."""
        squares, changes = self._squares(), lengths.square()
        sums = squares + _norms(self._before).square_() + changes
        noise = self._noise(squares, changes, sums * self._x.shape[0]) + self._floor() * self._n_columns
        k = self._k
        noise *= _WEIGHT**2 * (1 + 2 * sqrt(_RARE / k) + 2 * _RARE / k)
        return noise.sqrt_() + 6 * _WEIGHT * expected.spread

    def _squares(self) -> torch.Tensor:
        """Return ‖w‖² of each row as it is written, in the columns that are multiplied; of a segment, stretched to them."""
        squares = self._lengths.square()
        if self.manner == "directions" or self._n_columns <= SEGMENT:
            return squares
        squares *= self._n_columns / SEGMENT
        ratio = float(_norms(self._after).median().square() / squares.median())
        return squares * (min(max(ratio, 1 / 16), 16.0) if isfinite(ratio) else 1.0)

    def _tiles_off(self, expected: Expected) -> torch.Tensor:
        """Return which of the tiles that are added up have sums that are off."""
        before, after = self._sums
        off = _norms(after - before - expected.sums)
        squares, changes = _norms(after).square_(), _norms(expected.sums).square_()
        n_rows = max((end - start for start, end in self._tiles), default=0)
        sums = (squares + _norms(before).square_() + changes) * n_rows
        n_sums = max(self._sums.shape[2], 1)
        noise = self._noise(squares, changes, sums) + self._floor() * n_rows * n_sums
        return ~(off <= TILE_RATIO * (1 + 4 / sqrt(n_sums)) * noise.sqrt_())

    def _noise(self, squares: torch.Tensor, changes: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """Return the variance that rounding explains, of values and changes of a size, and that of sums in float32."""
        rounding = squares.clone()
        if self.halved:  # the lower half of a view's mantissa is another value, and that may have changed too
            rounding += 2 * changes.minimum(squares)
        if any(delta.rounded for delta in self._op.deltas):
            rounding += changes
        return (_ROUNDING * UNIT_ROUNDOFF[self._slot.dtype]) ** 2 * rounding + _FLOAT32**2 * sums

    def _floor(self) -> float:
        return _FLOOR[self._slot.dtype] ** 2


def _norms(rows: torch.Tensor) -> torch.Tensor:
    """Return the norms of rows, in float32: they are infinite, or zero, where a square is."""
    import torch

    found: torch.Tensor = torch.linalg.vector_norm(rows, dim=1)
    return found


def _lengths(views: TileViews) -> torch.Tensor:
    """Return the lengths of whole rows."""
    squares = _norms(views.odd).square_()
    if views.even is not None:
        squares += _norms(views.even).square_() + views.first.float().square()
    return squares.sqrt_()


def _ranges(rows: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Return the rows that are marked, as ranges; all rows, where that would be too many ranges."""
    found: list[tuple[int, int]] = []
    for row in rows.nonzero().flatten().tolist():
        if found and found[-1][1] == row:
            found[-1] = (found[-1][0], row + 1)
        else:
            found.append((row, row + 1))
    return tuple(found) if len(found) <= _MOST_RANGES else ((0, len(rows)),)

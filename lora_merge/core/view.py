"""How a tensor is looked at while it is merged: matrices, row tiles, column panels, and the block that a module owns."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

TILE_ELEMENTS = 1 << 19
"""Elements of a row tile: few enough to stay in the cache from reading to writing, enough to outweigh the
fixed cost of the dozen calls that a tile takes (measured: 2¹⁸ and 2²⁰ are slower)."""


MIN_TILE_ROWS = 64
"""Rows of the smallest tile. Matrix libraries use other kernels, with other rounding, for a handful of
rows; from 16 on every tile has the bits of the whole product (measured with MKL)."""


PANEL_ELEMENTS = 1 << 24
"""Elements of a column panel, read by what has to look down whole columns."""


@dataclass(frozen=True, slots=True)
class View:
    """How a tensor is looked at: a stack of matrices, each worked on row by row.

    A linear weight is one matrix ``[out, in]``, a convolution ``[out, in · kernel]``, a bias ``[n, 1]``; stacked
    experts are as many matrices.
    """

    blocks: int
    rows: int
    columns: int

    @classmethod
    def of(cls, shape: tuple[int, ...], *, stacked: bool = False) -> View:
        """Return the view of a tensor.

        Example:
            >>> View.of((8, 4, 3, 3)), View.of((8, 4, 3), stacked=True)
            (View(blocks=1, rows=8, columns=36), View(blocks=8, rows=4, columns=3))
        """
        if stacked and len(shape) == 3:
            return cls(*shape)
        return cls(1, shape[0] if shape else 1, math.prod(shape[1:]))

    @property
    def n_rows(self) -> int:
        """Rows of all blocks together."""
        return self.blocks * self.rows

    def tiles(self, elements: int | None = None, rows: int = 1) -> list[tuple[int, int]]:
        """Return the row ranges that the tensor is worked on in, of equal size give or take ``rows``.

        Args:
            elements: of a tile, about; default: `TILE_ELEMENTS`.
            rows: each range begins at a multiple of this number of rows of its matrix.

        Example:
            >>> View(1, 1024, 1024).tiles()
            [(0, 512), (512, 1024)]
        """
        wanted = max(MIN_TILE_ROWS, (elements or TILE_ELEMENTS) // max(self.columns, 1))
        if wanted >= 2 * self.rows:  # several blocks at once
            # A multiple of the rows of one matrix, so that no tile cuts one.
            return _ranges(self.n_rows, max(self.rows, 1) * (wanted // max(self.rows, 1)))
        return [
            (block * self.rows + start, block * self.rows + end)
            for block in range(self.blocks)
            for start, end in _spread(self.rows, wanted, rows)
        ]

    def panels(self) -> list[tuple[int, int]]:
        """Return the column ranges that a survey reads, each of `PANEL_ELEMENTS` at most but one column at least."""
        return _ranges(self.columns, max(1, PANEL_ELEMENTS // max(self.n_rows, 1)))


@dataclass(frozen=True, slots=True)
class Block:
    """The part of a viewed tensor that one module owns, as ranges of matrices, rows and columns."""

    view: View
    blocks: tuple[int, int]
    """Matrices of the stack."""

    rows: tuple[int, int]
    """Of each of them."""

    columns: tuple[int, int]

    @classmethod
    def of(cls, view: View, box: tuple[tuple[int, int], ...]) -> Block:
        """Return the block of a region; of an empty one, everything.

        Example:
            >>> Block.of(View(8, 4, 3), ((2, 3), (0, 2), (0, 3))).row_ranges()
            [(8, 10)]

        Raises:
            ValueError: the box has more than three axes.
        """
        if not box:
            return cls(view, (0, view.blocks), (0, view.rows), (0, view.columns))
        match box:
            case (rows,) | (rows, _):
                return cls(view, (0, 1), rows, *(box[1:] or ((0, view.columns),)))
            case (blocks, rows, columns):
                return cls(view, blocks, rows, columns)
        raise ValueError(f"a region of {len(box)} axes is not a block of matrices")

    def row_ranges(self) -> list[tuple[int, int]]:
        """Return its rows, counted through all matrices of the view; adjacent ones are one range."""
        size = self.view.rows
        if self.rows == (0, size):
            return [(self.blocks[0] * size, self.blocks[1] * size)]
        # A part of each matrix, so that rows of no interest are in between.
        return [(block * size + self.rows[0], block * size + self.rows[1]) for block in range(*self.blocks)]

    def column_ranges(self) -> list[tuple[int, int]]:
        """Return its columns, counted through all matrices of the view."""
        size = self.view.columns
        return [(n * size + self.columns[0], n * size + self.columns[1]) for n in range(*self.blocks)]


class Spread:
    """Blocks sorted by their rows, so that those that meet a tile are found by bisection."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._ranges = sorted(
            (first, last, n) for n, block in enumerate(blocks) for first, last in block.row_ranges()
        )
        self._longest = max((last - first for first, last, _ in self._ranges), default=0)

    def meeting(self, start: int, end: int) -> list[int]:
        """Return the numbers of the blocks that have some of the rows ``start`` to ``end``, in ascending order.

        Example:
            >>> Spread([Block.of(View(4, 8, 3), ((n, n + 1), (0, 8), (0, 3))) for n in range(4)]).meeting(7, 17)
            [0, 1, 2]
        """
        found = set()
        # A range that begins further back than the longest one is long cannot reach these rows.
        for at in range(bisect.bisect_left(self._ranges, (start - self._longest,)), len(self._ranges)):
            first, last, n = self._ranges[at]
            if first >= end:
                break
            if last > start:
                found.add(n)
        return sorted(found)


@lru_cache(maxsize=4096)  # A plan asks it for thousands of matrices of few shapes.
def _spread(n: int, wanted: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """Return ranges that cover n, ``wanted`` long or longer where n allows, of one size give or take a multiple."""
    n_units = -(-n // multiple)
    # Rounded down, so that no tile is smaller than wanted: a short last one may get other bits (`MIN_TILE_ROWS`).
    n_ranges = max(1, n_units // -(-wanted // multiple))
    ends = (n_units * k // n_ranges * multiple for k in range(n_ranges + 1))
    return tuple(pairwise(min(end, n) for end in ends))


def _ranges(n: int, size: int) -> list[tuple[int, int]]:
    """Return ranges of a size, the last one shorter."""
    return [(start, min(start + size, n)) for start in range(0, n, size)]

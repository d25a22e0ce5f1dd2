"""Where the parts of a tile lie. A tile is cut into *lines*, each of ``in`` values, which is how quantised weights are packed."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from lora_merge.core.tensor import nbytes_of
from lora_merge.core.weight import PartRange

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from lora_merge.core.weight import Tile


class Lines(NamedTuple):
    """The lines of a tile: the last axis of the weight is one line, the axis before it is one matrix.

    They are numbered through all matrices of a stack. A tile may begin within one matrix and end within another.
    """

    width: int
    """Values of a line, ``in``."""

    rows: int
    """Lines of one matrix, ``out``."""

    start: int
    end: int

    @property
    def n(self) -> int:
        """Number of lines."""
        return self.end - self.start

    @property
    def matrices(self) -> tuple[int, int]:
        """The matrices that have some of the lines: the first, and the one after the last."""
        return self.start // self.rows, (self.end - 1) // self.rows + 1

    def block_row(self, line: int, block_rows: int) -> int:
        """Return the row of a grid that a line belongs to, numbered through all matrices: each matrix has a separate
        grid.

        Args:
            line: its number.
            block_rows: lines of a block; 0 for all lines of a matrix.

        Example:
            >>> Lines(4, 192, 0, 384).block_row(192 + 130, 128)
            3
        """
        block = block_rows or self.rows
        matrix, row = divmod(line, self.rows)
        return matrix * -(-self.rows // block) + row // block

    def block_rows_of(self, block_rows: int, device: torch.device) -> torch.Tensor:
        """Return, for each line, its row in what `by_block` reads: int32 ``[lines]``, not to be changed."""
        block = block_rows or self.rows
        first, last = self.matrices
        # On a GPU another worker's stream might use what this one has not made yet.
        if last - first == 1 and device.type == "cpu":
            return _blocks_of(self.start % self.rows % block, self.n, block)
        import torch

        line = torch.arange(self.start, self.end, dtype=torch.int32, device=device)
        found = (line % self.rows).div_(block, rounding_mode="floor")
        found += line.div_(self.rows, rounding_mode="floor").mul_(-(-self.rows // block))
        return found.sub_(self.block_row(self.start, block_rows))


# Asked for every tile, when it is read and when it is written; tiles begin at few different places of a block.
@lru_cache(64)
def _blocks_of(first: int, n: int, block: int) -> torch.Tensor:
    """Return the blocks of ``n`` lines of one matrix, counted from that of the first one, which is line ``first`` of it."""
    import torch

    return torch.arange(first, first + n, dtype=torch.int32).div_(block, rounding_mode="floor")


# Asked for every tile, with few different shapes.
@lru_cache
def _line(shape: tuple[int, ...], n_rows: int) -> tuple[int, int, int]:
    """Return the values of a line, the lines of a matrix, and the lines of one of ``n_rows`` rows."""
    width = shape[-1] if len(shape) > 1 else 1
    rows = shape[-2] if len(shape) > 1 else prod(shape)
    return width, rows, prod(shape) // (max(n_rows, 1) * width)


def lines_of(tile: Tile) -> Lines:
    """Return a tile as lines, whichever way its weight is divided into rows.

    Example:
        >>> from lora_merge.core.weight import Tile
        >>> lines_of(Tile((4, 6, 8), 4, 1, 3)), lines_of(Tile((4, 6, 8), 24, 6, 18))
        (Lines(width=8, rows=6, start=6, end=18), Lines(width=8, rows=6, start=6, end=18))
    """
    width, rows, each = _line(tile.shape, tile.n_rows)
    return Lines(width, rows, tile.start * each, tile.end * each)


def by_line(lines: Lines, dtype: str, columns: int) -> PartRange:
    """Return the range of a part that has one row of ``columns`` entries for each line: ``[lines, columns]``.

    Args:
        lines: of the tile.
        dtype: as the codec wants it; it may differ from the stored one (U32 words as ``"U8"``).
        columns: entries of that dtype for each line.
    """
    return _rows(dtype, columns, lines.start, lines.end)


def by_block(lines: Lines, dtype: str, block_rows: int, columns: int) -> PartRange:
    """Return the range of a part that has one row of ``columns`` entries for each ``block_rows`` lines of a matrix (0: for
    each matrix). It holds the rows of all lines, from the first to the last: ``[rows of the grid, columns]``.
    """
    first, last = (lines.block_row(line, block_rows) for line in (lines.start, lines.end - 1))
    return _rows(dtype, columns, first, last + 1)


def whole(dtype: str, shape: tuple[int, ...]) -> PartRange:
    """Return the range of a part that every tile needs from end to end."""
    return PartRange(dtype, shape, ((0, nbytes_of(dtype, shape)),))


def _rows(dtype: str, columns: int, first: int, last: int) -> PartRange:
    row = nbytes_of(dtype, (columns,))
    return PartRange(dtype, (last - first, columns), ((first * row, (last - first) * row),))


def groups_of(width: int, group: int) -> int:
    """Return the groups of a line; the last may be cut off. A group of 0 is the whole line.

    Example:
        >>> groups_of(448, 128), groups_of(448, 0)
        (4, 1)
    """
    return -(-width // (group or width))


def in_groups(values: torch.Tensor, group: int) -> Iterator[tuple[torch.Tensor, slice]]:
    """Yield views of the values of some lines, and the columns of the grid that belong to each: the whole groups
    ``[lines, groups, group]``, then the last one if it is cut off. ``view.mul_(scale[:, columns, None])`` scales them in place.

    Args:
        values: ``[lines, in]``.
        group: values of a group; 0 for the whole line.
    """
    width = values.shape[1]
    size = group or width
    full = width // size
    if full:
        yield values[:, : full * size].view(-1, full, size), slice(0, full)
    if full * size < width:
        yield values[:, full * size :].unsqueeze(1), slice(full, full + 1)

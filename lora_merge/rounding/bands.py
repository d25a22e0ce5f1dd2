"""Bands of lines, the unit in which a matrix is rounded; and the panels of columns that a band passes through, transposed.

A product of matrices may have other bits where its shape is another. So lines are taken in bands whose size depends on the
number of columns alone, counted from the first line of the matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.codecs.lattice import Floats, Integers
from lora_merge.rounding.schedule import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from lora_merge.codecs.grid import Grid
    from lora_merge.codecs.lattice import Lattice

REACH = 4
"""Steps by which a value may be moved before it becomes the nearest level. A step is the gap between the two levels next to
the value (for a level: the gap above it or the one below, whichever is larger), times its scale.
"""

_ELEMENTS = 1 << 22
_ALIGNED = 16
"""Float32 numbers in 64 bytes: each transposed column begins at a multiple."""


def band_rows(columns: int) -> int:
    """Return the lines of a band: a power of two between 64 and 1024, about 2^22 values.

    Example:
        >>> band_rows(128), band_rows(4096), band_rows(14336), band_rows(1 << 20)
        (1024, 1024, 256, 64)
    """
    lines = max(_ELEMENTS // max(columns, 1), 1)
    return min(max(1 << (lines.bit_length() - 1), 64), 1024)


class Panel:
    """Some adjacent columns of a band, transposed. The levels that are chosen are put into `levels`.

    Shapes:
        numbers, levels: float32 ``[columns, width]``; shift: float32 ``[columns of a block, width]``, and other: ``[1,
        width]``, for the rounding to work in.
    """

    def __init__(
        self, lattice: Lattice, numbers: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor | None
    ) -> None:
        self.lattice, self.numbers, self.levels, self._scale = lattice, numbers, levels, scale
        self.shift, self.other = (
            numbers.new_empty((BLOCK, numbers.shape[1])),
            numbers.new_empty((1, numbers.shape[1])),
        )
        self._bound = None if isinstance(lattice, Integers) else _largest_shift(lattice, numbers)
        self._negative = None if self._bound is None else self._bound.neg()

    def scale_of(self, first: int, n: int) -> torch.Tensor | None:
        """Return the scale of ``n`` columns, ``[n, width]`` or ``[1, width]``; None for 1."""
        if self._scale is None or len(self._scale) != len(self.numbers):
            return self._scale
        return self._scale[first : first + n]

    def cap_(self, shift: torch.Tensor, first: int) -> None:
        """Limit by how much the numbers of some columns, from ``first``, are moved."""
        import torch

        if self._bound is None or self._negative is None:
            shift.clamp_(-REACH, REACH)
        else:
            end = first + len(shift)
            torch.clamp(shift, self._negative[first:end], self._bound[first:end], out=shift)


def _largest_shift(lattice: Lattice, numbers: torch.Tensor) -> torch.Tensor:
    """Return by how much each number may be moved, at most `REACH` steps."""
    import torch

    if isinstance(lattice, Floats):
        # A number's size is between 1 and 2 times the power of two below it, which the step goes with.
        return numbers.abs().clamp_(min=2.0**lattice.smallest).mul_(REACH / 2 * 2.0**-lattice.mantissa_bits)
    first, last = (torch.tensor(end, dtype=numbers.dtype) for end in lattice.ends)
    inside = numbers.clamp(torch.nextafter(first, last).item(), torch.nextafter(last, first).item())
    below, above = lattice.neighbours(inside)
    return above.sub_(below).mul_(REACH)


class Band:
    """Some lines of a matrix with their grid, ``width`` of them with those that are added to fill 64 bytes.

    Args:
        values: of the lines of a tile, float32.
        grid: of the same lines.
        rows: the first line of the band, and the one after the last.
        along: bands are bands of columns, and the sequence runs over the lines.
    """

    def __init__(self, values: torch.Tensor, grid: Grid, rows: tuple[int, int], *, along: bool) -> None:
        self.lattice, self.rows, self.along = grid.lattice, rows, along
        self.n_rows = rows[1] - rows[0]
        self.width = -(-self.n_rows // _ALIGNED) * _ALIGNED
        self._values = values
        self.n_columns = len(values) if along else values.shape[1]
        self._scale, self._zero, self._bias = (
            _Spread(self, part, grid.group) for part in (grid.scale, grid.zero, grid.bias)
        )

    def panels(self, levels: torch.Tensor, sizes: Sequence[int]) -> Iterator[Panel]:
        """Yield the columns in their order. After each the levels that it was given are put into their places.

        Args:
            levels: float32, in the shape of the values of the tile.
            sizes: columns of each panel.
        """
        buffers = self._values.new_zeros((3, max(sizes), self.width))
        first = 0
        for n in sizes:
            numbers, chosen = buffers[0, :n], buffers[1, :n]
            turn = buffers[2].view(-1)[: n * self.width].view(self.width, n)
            self._take(numbers, turn, first)
            scale = self._scale.at(first, n)
            if (bias := self._bias.at(first, n)) is not None:
                numbers.sub_(bias)
            if scale is not None:
                numbers.div_(scale)
            if (zero := self._zero.at(first, n)) is not None:
                numbers.add_(zero)
            yield Panel(self.lattice, numbers, chosen, scale)
            self._put(levels, chosen, turn, first)
            first += n

    def _take(self, numbers: torch.Tensor, turn: torch.Tensor, first: int) -> None:
        start, end = self.rows
        n = len(numbers)
        if self.along:
            numbers[:, : self.n_rows] = self._values[first : first + n, start:end]
            return
        # Two copies: one of lines, and one that is transposed in blocks. At once it takes four times as long.
        turn[: self.n_rows] = self._values[start:end, first : first + n]
        turn[self.n_rows :] = 0
        numbers.copy_(turn.t())

    def _put(self, levels: torch.Tensor, chosen: torch.Tensor, turn: torch.Tensor, first: int) -> None:
        start, end = self.rows
        n = len(chosen)
        if self.along:
            levels[first : first + n, start:end] = chosen[:, : self.n_rows]
            return
        turn.copy_(chosen.t())
        levels[start:end, first : first + n] = turn[: self.n_rows]


class _Spread:
    """A scale, zero or bias of each group, as each value of a transposed panel needs it."""

    def __init__(self, band: Band, part: torch.Tensor | None, group: int | torch.Tensor) -> None:
        self._part, self._along = part, band.along
        if part is None:
            return
        import torch

        start, end = band.rows
        self._padding = (0, band.width - band.n_rows)
        if isinstance(group, int):
            n = end if band.along else band.n_columns
            self._group = torch.arange(n, device=part.device) // (group or n)
        else:
            self._group = group.long()
        if band.along:
            self._group = self._group[start:end]
        else:
            self._part = torch.nn.functional.pad(part[start:end].t(), self._padding, value=1.0).contiguous()
            self._groups = self._group.tolist()

    def at(self, first: int, n: int) -> torch.Tensor | None:
        """Return it for ``n`` columns from ``first``: float32 ``[n, width]``, or ``[1, width]`` where they share it."""
        import torch

        if self._part is None:
            return None
        if self._along:
            found = self._part[first : first + n].index_select(1, self._group)
            return torch.nn.functional.pad(found, self._padding, value=1.0)
        groups = self._groups[first : first + n]
        if min(groups) == max(groups):
            return self._part[groups[0] : groups[0] + 1]
        return self._part.index_select(0, self._group[first : first + n])

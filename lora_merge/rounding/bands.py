"""Bands of lines, the unit in which a matrix is rounded; and the panels of columns that a band passes through, transposed.

A product of matrices may have other bits where its shape is another. So lines are taken in bands whose size depends on the
number of columns alone, counted from the first line of the matrix.
"""

from __future__ import annotations

from itertools import repeat
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from lora_merge.codecs.lattice import Floats, Integers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import torch

    from lora_merge.codecs.grid import Grid
    from lora_merge.codecs.lattice import Lattice

REACH = 4
"""Steps by which a value may be moved before it becomes the nearest level. A step is the gap between the two levels next to
the value (for a level: the gap above it or the one below, whichever is larger), times its scale.
"""

_ALIGNED = 16
"""Float32 numbers in 64 bytes: each transposed column begins at a multiple."""


class Block(NamedTuple):
    """Some columns of a panel, float32 ``[columns, width]``."""

    numbers: torch.Tensor
    """Where the values are between the levels."""

    levels: torch.Tensor
    """The levels that are chosen."""

    moved: torch.Tensor
    """What they are the nearest levels to."""

    lowest: torch.Tensor
    """No number may be moved to below it."""

    highest: torch.Tensor
    """Nor to above it."""

    scale: torch.Tensor | None
    """The same shape, or ``[1, width]``; None for 1."""


class Panel(NamedTuple):
    """Some adjacent columns of a band, transposed; the fields are those of `Block`."""

    numbers: torch.Tensor
    levels: torch.Tensor
    moved: torch.Tensor
    lowest: torch.Tensor
    highest: torch.Tensor
    scale: torch.Tensor | None

    def blocks(self, sizes: Sequence[int]) -> Iterator[Block]:
        """Yield the columns in blocks of these sizes."""
        # All views of a kind at once: cut one by one, they take as long as the arithmetic.
        kinds = (self.numbers, self.levels, self.moved, self.lowest, self.highest)
        parts = [part.split_with_sizes(sizes) for part in kinds]
        scales: Iterable[torch.Tensor | None] = repeat(self.scale, len(sizes))
        if self.scale is not None and len(self.scale) == len(self.numbers):
            scales = self.scale.split_with_sizes(sizes)
        return map(Block, *parts, scales)

    def limit(self, lattice: Lattice) -> None:
        """Set by how much each number may be moved: not beyond the ends of a lattice that has no levels there."""
        import torch

        step: torch.Tensor | float = 1.0
        reach = float(REACH)
        if isinstance(lattice, Floats):
            # A number's size is between 1 and 2 times the power of two below it, which the step goes with.
            step = torch.abs(self.numbers, out=self.lowest).clamp_(2.0**lattice.smallest, lattice.largest)
            reach *= 2.0 ** -(1 + lattice.mantissa_bits)
        elif not isinstance(lattice, Integers):
            first, last = (torch.tensor(end, dtype=torch.float32) for end in lattice.ends)
            # At an end both neighbours are the end itself, and the step would be 0.
            inside = self.numbers.clamp(
                torch.nextafter(first, last).item(), torch.nextafter(last, first).item()
            )
            below, above = lattice.neighbours(inside)
            step = above.sub(below)
        torch.add(self.numbers, step, alpha=reach, out=self.highest)
        torch.sub(self.numbers, step, alpha=reach, out=self.lowest)
        if is_limited(lattice):
            self.highest.clamp_(*lattice.ends)
            self.lowest.clamp_(*lattice.ends)


def is_limited(lattice: Lattice) -> bool:
    """Return True where the bounds of a panel's numbers are within the lattice, so that rounding need not look at its ends."""
    return type(lattice) in {Floats, Integers}


class Memory:
    """Buffers that are used again for every tile of a worker: memory that is new is slow to write."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def of(self, use: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """Return a buffer. What it had in it for the same use is overwritten.

        Args:
            use: what it is for.
            shape: that is wanted.
            like: a tensor of the same dtype and device.
        """
        n = prod(shape)
        held = self._held.get(use)
        if held is None or held.numel() < n or (held.dtype, held.device) != (like.dtype, like.device):
            # The old one goes first, or both are there at the same time.
            self._held.pop(use, None)
            held = None
            held = self._held[use] = like.new_empty(n)
        return held[:n].view(shape)


class Workspace:
    """Memory for the panels of all bands of a tile.

    Args:
        values: of the tile.
        columns: of a panel, at most.
        width: lines of a band, at most.
        memory: where the memory is from.
    """

    def __init__(self, values: torch.Tensor, columns: int, width: int, memory: Memory) -> None:
        self._memory = memory.of("panels", (5, columns * _aligned(width)), values)

    def parts(self, columns: int, width: int) -> tuple[torch.Tensor, ...]:
        """Return five float32 ``[columns, width]``."""
        return tuple(part[: columns * width].view(columns, width) for part in self._memory)


def _aligned(width: int) -> int:
    return -(-width // _ALIGNED) * _ALIGNED


class Band:
    """Some lines of a matrix with their grid, ``width`` of them with those that are added to fill 64 bytes.

    Args:
        values: of the lines of a tile, float32.
        grid: of the same lines.
        rows: the first line of the band, and the one after the last.
        space: for its panels.
        along: bands are bands of columns, and the sequence runs over the lines.
    """

    def __init__(
        self, values: torch.Tensor, grid: Grid, rows: tuple[int, int], space: Workspace, *, along: bool
    ) -> None:
        self.lattice, self.rows, self.along = grid.lattice, rows, along
        self.n_rows = rows[1] - rows[0]
        self.width = _aligned(self.n_rows)
        self.n_columns = len(values) if along else values.shape[1]
        self._values, self._space = values, space
        self._scale, self._zero, self._bias = (
            _Spread(self, part, grid.group) for part in (grid.scale, grid.zero, grid.bias)
        )

    def panels(self, levels: torch.Tensor, sizes: Sequence[int]) -> Iterator[Panel]:
        """Yield the columns in their order. After each the levels that it was given are put into their places.

        Args:
            levels: float32, in the shape of the values of the tile; they may be one tensor.
            sizes: columns of each panel.
        """
        first = 0
        for n in sizes:
            numbers, chosen, moved, lowest, highest = self._space.parts(n, self.width)
            # Used before anything is moved, and after.
            turned = moved.view(self.width, n)
            self._take(numbers, turned, first)
            scale = self._scale.at(first, n)
            if (bias := self._bias.at(first, n)) is not None:
                numbers.sub_(bias)
            if scale is not None:
                numbers.div_(scale)
            if (zero := self._zero.at(first, n)) is not None:
                numbers.add_(zero)
            panel = Panel(numbers, chosen, moved, lowest, highest, scale)
            panel.limit(self.lattice)
            yield panel
            self._put(levels, chosen, turned, first)
            first += n

    def _take(self, numbers: torch.Tensor, turned: torch.Tensor, first: int) -> None:
        start, end = self.rows
        last = first + len(numbers)
        if self.along:
            numbers[:, : self.n_rows] = self._values[first:last, start:end]
            numbers[:, self.n_rows :] = 0
            return
        # Two copies: one of lines, and one that is transposed in blocks. At once it takes four times as long.
        turned[: self.n_rows] = self._values[start:end, first:last]
        turned[self.n_rows :] = 0
        numbers.copy_(turned.t())

    def _put(self, levels: torch.Tensor, chosen: torch.Tensor, turned: torch.Tensor, first: int) -> None:
        start, end = self.rows
        last = first + len(chosen)
        if self.along:
            levels[first:last, start:end] = chosen[:, : self.n_rows]
            return
        turned.copy_(chosen.t())
        levels[start:end, first:last] = turned[: self.n_rows]


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
            # Lines that only fill up 64 bytes are divided by 1, not by 0.
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

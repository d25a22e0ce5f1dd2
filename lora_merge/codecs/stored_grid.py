"""Grids whose scales are those that a weight is stored with: only its codes are written."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.codecs.geometry import lines_of
from lora_merge.codecs.grid import Grid

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from lora_merge.codecs.grid import Codes
    from lora_merge.codecs.lattice import Lattice
    from lora_merge.core.weight import Storage, Survey, Tile

_IN_PLACE_OF_ZERO = 2.0**-126
"""The smallest normal float32."""

_ROUNDINGS = 4 * 2.0**-23
"""What the arithmetic of encoding and decoding may add, relative to the largest number in it."""


class Coded:
    """What the codecs of codes and scales have in common. Each writes on the scales that it reads; some make new ones too."""

    def survey(self, storage: Storage) -> Survey:
        """Return ``"none"``: no scale depends on all values."""
        del storage
        return "none"

    def parts(self, shape: tuple[int, ...], storage: Storage) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Return nothing: no weight is stored this way that was not before, and then its own parts say what they are."""
        raise AssertionError(f"no new part of {shape} is stored as {storage.codec}")

    def look(self, values: torch.Tensor, found: torch.Tensor | None, storage: Storage) -> torch.Tensor:
        """Return the values: `survey` is ``"none"``, so this is never needed."""
        del found, storage
        return values

    def fresh_alignment(self, shape: tuple[int, ...], storage: Storage) -> int:
        """Return 1: with new scales a tile may begin where it may with stored ones."""
        del shape, storage
        return 1

    def grid(
        self,
        tile: Tile,
        values: torch.Tensor,
        out: Mapping[str, torch.Tensor],
        storage: Storage,
        survey: torch.Tensor | None,
        stored: Mapping[str, torch.Tensor] | None,
    ) -> Grid:
        """Return the grid of a tile, see `lora_merge.codecs.codec.Encoder`."""
        if stored is None:
            assert not tile.start % self.fresh_alignment(tile.shape, storage), "a tile begins within a block"
            return self.fresh(tile, values, out, storage, survey)
        return self.on_stored(tile, out, storage, stored)

    def on_stored(
        self,
        tile: Tile,
        out: Mapping[str, torch.Tensor],
        storage: Storage,
        stored: Mapping[str, torch.Tensor],
    ) -> Grid:
        """Return the grid of the scales that a tile is stored with; it fills the main part."""
        raise NotImplementedError

    def fresh(
        self,
        tile: Tile,
        values: torch.Tensor,
        out: Mapping[str, torch.Tensor],
        storage: Storage,
        survey: torch.Tensor | None,
    ) -> Grid:
        """Return the grid of scales that are made from the values, and written into ``out`` at once."""
        del tile, values, out, survey
        raise AssertionError(f"no scales are made for {storage.codec}")

    def bound(
        self, tile: Tile, values: torch.Tensor, parts: Mapping[str, torch.Tensor], storage: Storage
    ) -> torch.Tensor:
        """Return half the distance of the levels around each value, and what the arithmetic adds."""
        # New scales are in the parts by now, so both kinds are read as stored ones.
        grid, lines = self.grid(tile, values, parts, storage, None, parts), lines_of(tile)
        return largest_error(grid, values.view(lines.n, lines.width)).view(values.shape)


def stored_grid(
    lattice: Lattice,
    pack: Callable[[torch.Tensor], object],
    unpack: Callable[[], torch.Tensor],
    scale: torch.Tensor,
    *,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    group: int | torch.Tensor = 0,
) -> Grid:
    """Return a grid of stored scales. Where one is 0, codes mean nothing: those that are stored stay.

    Args:
        lattice: of the codes.
        pack: stores levels, float32 ``[lines, in]``. It may change them. Where there are two zeros, one that stays zero keeps
            its sign (`lora_merge.codecs.tables.keep_signs_of_zeros_`): a sum with a change of 0 has no negative zero.
        unpack: returns the stored levels, in the same shape.
        scale: float32 ``[lines, groups]``, perhaps with zeros; it is not changed.
        zero: as in `Grid`; bias: as there; group: as there.
    """
    is_zero = scale == 0
    has_zeros = bool(is_zero.any())
    if has_zeros:
        scale = scale.masked_fill(is_zero, _IN_PLACE_OF_ZERO)

    def keep(levels: torch.Tensor) -> None:
        if has_zeros:
            is_kept = _of_columns(is_zero, group, levels.shape[1])
            levels.copy_(unpack().where(is_kept, levels))
        pack(levels)

    return Grid(lattice, keep, scale, zero, bias, group)


def stored_at_once(grid: Grid, scale: torch.Tensor, codes: Codes | None) -> Grid:
    """Return a grid of stored scales that compiled code may fill, if every code means something.

    Args:
        grid: what `stored_grid` made of the scales.
        scale: as it was given.
        codes: where they are stored.
    """
    has_zeros = grid.scale is not scale
    return grid if has_zeros else replace(grid, codes=codes)


def _of_columns(found: torch.Tensor, group: int | torch.Tensor, width: int) -> torch.Tensor:
    """Return for each column what is said of its group: ``[lines, groups]`` becomes ``[lines, in]``."""
    if isinstance(group, int):
        return found.repeat_interleave(group or width, 1)[:, :width]
    return found.index_select(1, group)


def largest_error(grid: Grid, values: torch.Tensor) -> torch.Tensor:
    """Return the largest error of rounding to the nearest level, for each value: infinite beyond the last level.

    Shapes:
        values: float32 ``[lines, in]``; the result has the same.
    """
    numbers = grid.numbers(values)
    below, above = grid.lattice.neighbours(numbers)
    low, high = grid.values(below), grid.values(above)
    size = low.abs().maximum(high.abs()).maximum(values.abs())
    if grid.bias is not None:
        # A value may be the small difference of a product and a bias.
        size += grid.bias.abs().amax(1, keepdim=True)
    error = (high - low).abs_().div_(2).add_(size, alpha=_ROUNDINGS)
    first, last = grid.lattice.ends
    # The arithmetic may put the largest value of a group a little beyond the last level.
    slack = _ROUNDINGS * max(abs(first), abs(last))
    return error.masked_fill_((numbers < first - slack) | (numbers > last + slack), float("inf"))

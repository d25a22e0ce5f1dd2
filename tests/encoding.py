"""Encoding onto stored grids without files: what a merge does with a codec, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lora_merge.codecs import ENCODERS
from lora_merge.codecs.geometry import lines_of
from lora_merge.core.tensor import STORED_TYPES
from lora_merge.core.weight import WEIGHT, Storage, Tile
from tests.decoding import parts_of, raw

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_merge.codecs.grid import Grid

GARBAGE = 0xA5


def grid_of(
    tile: Tile,
    values: torch.Tensor,
    stored: Mapping[str, torch.Tensor],
    storage: Storage,
    out: torch.Tensor | None = None,
) -> Grid:
    """Return the grid of a tile of the stored scales.

    Args:
        tile: which rows.
        values: float32 ``[rows, columns]``, of the tile.
        stored: the parts of the whole weight.
        storage: how they are stored.
        out: where the main part goes; new memory by default.
    """
    parts = parts_of(tile, stored, storage)
    kept = out_of(tile, storage) if out is None else out
    return ENCODERS[storage.codec].grid(tile, values, {WEIGHT: kept}, storage, None, parts)


def out_of(tile: Tile, storage: Storage) -> torch.Tensor:
    """Return memory for the main part of a tile, as a reused buffer is: full of something else."""
    one = ENCODERS[storage.codec].ranges(tile, storage)[WEIGHT]
    found = torch.full((one.nbytes,), GARBAGE, dtype=torch.uint8)
    return found.view(getattr(torch, STORED_TYPES[one.dtype])).view(one.shape)


def encoded(
    values: torch.Tensor, stored: Mapping[str, torch.Tensor], storage: Storage, tiles: Sequence[Tile]
) -> bytes:
    """Return the bytes of the main part of a weight, whose values were rounded to the nearest tile by tile.

    Args:
        values: of the whole weight, in its shape.
        stored: its parts, whose scales are kept.
        storage: how they are stored.
        tiles: that make up the weight, in order.
    """
    content, before, out = bytearray(len(raw(stored[WEIGHT]))), None, None
    for tile in tiles:
        one = ENCODERS[storage.codec].ranges(tile, storage)[WEIGHT]
        if one.ranges != before:
            # What lies across the rows is one buffer for all tiles.
            before, out = one.ranges, out_of(tile, storage)
        rows = values.reshape(tile.n_rows, -1)[tile.start : tile.end].clone()
        grid, lines = grid_of(tile, rows, stored, storage, out), lines_of(tile)
        levels = grid.nearest(rows.view(lines.n, lines.width))
        grid.keep(levels)
        found, at = raw(out), 0
        for first, nbytes in one.ranges:
            content[first : first + nbytes] = found[at : at + nbytes]
            at += nbytes
    return bytes(content)

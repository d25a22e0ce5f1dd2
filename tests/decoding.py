"""Decoding stored parts without files: what a reader does with a codec, and nothing else."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lora_merge.codecs import CODECS
from lora_merge.core.tensor import STORED_TYPES
from lora_merge.core.view import View
from lora_merge.core.weight import Storage, Tile

if TYPE_CHECKING:
    from collections.abc import Mapping

UNWRITTEN = -12345.0


def storage_of(codec: str, dtype: str, **settings) -> Storage:
    """Return a storage, its settings in order."""
    return Storage(codec, dtype, tuple(sorted(settings.items())))


def raw(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def views_of(shape: tuple[int, ...]) -> list[View]:
    """Return the ways in which a weight is divided into rows."""
    return [View.of(shape), View.of(shape, stacked=True)] if len(shape) == 3 else [View.of(shape)]


def tiles_of(shape: tuple[int, ...], storage: Storage, view: View, elements: int) -> list[Tile]:
    """Return the tiles of a merge."""
    multiple, _ = CODECS[storage.codec].alignment(shape, view.n_rows, storage)
    return [Tile(shape, view.n_rows, *limits) for limits in view.tiles(elements, multiple)]


def parts_of(tile: Tile, stored: Mapping[str, torch.Tensor], storage: Storage) -> dict[str, torch.Tensor]:
    """Return the parts of a tile, cut out of the stored tensors by the ranges that the codec names."""
    parts = {}
    for role, one in CODECS[storage.codec].ranges(tile, storage).items():
        whole = raw(stored[role])
        found = b"".join(whole[first : first + nbytes] for first, nbytes in one.ranges)
        dtype = getattr(torch, STORED_TYPES[one.dtype])
        parts[role] = torch.frombuffer(bytearray(found), dtype=dtype).view(one.shape)
    return parts


def decoded(
    shape: tuple[int, ...], storage: Storage, stored: Mapping[str, torch.Tensor], tile: Tile | None = None
) -> torch.Tensor:
    """Return the values of a tile, ``[rows, columns]``; without one, those of the whole weight, in its shape."""
    wanted = tile or Tile(shape, shape[0], 0, shape[0])
    columns = math.prod(shape) // wanted.n_rows
    out = torch.full((wanted.end - wanted.start, columns), UNWRITTEN)
    CODECS[storage.codec].decode(wanted, parts_of(wanted, stored, storage), out, storage)
    return out if tile else out.view(shape)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return True where the bits of all numbers are equal, and what is NaN in one is NaN in both."""
    numbers = ~one.isnan()
    return (
        one.shape == other.shape
        and torch.equal(numbers, ~other.isnan())
        and torch.equal(one[numbers].view(torch.int32), other[numbers].view(torch.int32))
    )


def is_same_in_tiles(shape: tuple[int, ...], storage: Storage, stored: Mapping[str, torch.Tensor]) -> bool:
    """Return True where tiles of all sizes, in all views, give the values of the whole."""
    whole = decoded(shape, storage, stored)
    return all(
        same(
            torch.cat(
                [decoded(shape, storage, stored, tile) for tile in tiles_of(shape, storage, view, elements)]
            ),
            whole.view(view.n_rows, -1),
        )
        for view in views_of(shape)
        for elements in (1, 1 << 14, 1 << 19)
    )

"""Decodes a weight whose parts are in memory already."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from lora_merge.codecs import CODECS
from lora_merge.core.tensor import STORED_TYPES
from lora_merge.core.weight import Tile

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.core.weight import PartRange, Storage


def decoded(shape: tuple[int, ...], storage: Storage, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a whole weight as float32, in its shape.

    Args:
        shape: of the weight.
        storage: how it is stored.
        parts: role → the stored tensor, on the CPU.
    """
    import torch

    codec, n_rows = CODECS[storage.codec], shape[0] if shape else 1
    tile = Tile(shape, n_rows, 0, n_rows)
    out = torch.empty(n_rows, prod(shape) // max(n_rows, 1))
    ranges = codec.ranges(tile, storage)
    codec.decode(tile, {role: _cut(parts[role], one) for role, one in ranges.items()}, out, storage)
    return out.view(shape)


def _cut(part: torch.Tensor, wanted: PartRange) -> torch.Tensor:
    """Return the bytes of a stored part that a codec wants, as it wants them."""
    import torch

    raw = part.contiguous().view(-1).view(torch.uint8)
    pieces = [raw[first : first + nbytes] for first, nbytes in wanted.ranges]
    # Joined pieces begin where memory was allocated, so that words of any size can be looked at in them.
    return torch.cat(pieces).view(getattr(torch, STORED_TYPES[wanted.dtype])).view(wanted.shape)

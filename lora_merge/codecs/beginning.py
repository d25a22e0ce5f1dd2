"""The first rows of a tile, and their share of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.codecs.codec import Codec
    from lora_merge.core.weight import PartRange, Storage, Tile


def beginning_of(
    codec: Codec, tile: Tile, n_rows: int, parts: Mapping[str, torch.Tensor], storage: Storage
) -> tuple[Tile, Mapping[str, torch.Tensor]]:
    """Return a tile with at least the first rows of another one, and views of its parts; the other one where a part is not stored
    row after row.

    Args:
        codec: that the tile is stored with.
        tile: all rows.
        n_rows: that are wanted.
        parts: of the tile, as `Codec.ranges` says.
        storage: with the settings of the codec.
    """
    multiple, _ = codec.alignment(tile.shape, tile.n_rows, storage)
    first = tile._replace(end=min(tile.start + -(-n_rows // multiple) * multiple, tile.end))
    whole, own = codec.ranges(tile, storage), codec.ranges(first, storage)
    if not all(_is_beginning(part, whole[role]) for role, part in own.items()):
        return tile, parts
    return first, {role: _cut(parts[role], part) for role, part in own.items()}


def _is_beginning(part: PartRange, whole: PartRange) -> bool:
    return len(part.ranges) == len(whole.ranges) == 1 and part.ranges[0][0] == whole.ranges[0][0]


def _cut(part: torch.Tensor, first: PartRange) -> torch.Tensor:
    """Return the first bytes of a part as a tensor of the same dtype."""
    import torch

    return part.flatten().view(torch.uint8)[: first.nbytes].view(part.dtype).view(first.shape)

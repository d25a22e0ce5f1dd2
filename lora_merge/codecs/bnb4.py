"""NF4 and FP4 of bitsandbytes: 4-bit codes of a table, with a scale for each block of the flattened weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_merge.codecs.geometry import in_groups, whole
from lora_merge.core.tensor import nbytes_of
from lora_merge.core.weight import WEIGHT, PartRange

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.core.weight import Storage, Tile


class Bnb4:
    """``table[code] · absmax`` (bitsandbytes 0.50, ``functional.dequantize_4bit``).

    The first of two codes is in the HIGH half of a byte. Blocks go on from one row to the next.

    Parts, of a weight of n values:
        weight: ⌈n / 2⌉ bytes, whatever dtype they are stored as.
        table: F32 ``[16]``.
        absmax: F32 ``[⌈n / block⌉]``; quantised itself where the setting ``nested`` is not 0: U8, codes of ``nested_table``.
        nested_absmax: F32, one for each ``nested`` blocks. absmax = nested_table[code] · nested_absmax + offset.
        nested_table: F32 ``[256]``.
    """

    def alignment(self, shape: tuple[int, ...], n_rows: int, storage: Storage) -> tuple[int, int]:
        """Return the rows after which a block begins."""
        columns = math.prod(shape) // max(n_rows, 1)
        block = int(dict(storage.settings)["block"])
        return block // math.gcd(columns, block), 1

    def ranges(self, tile: Tile, storage: Storage) -> Mapping[str, PartRange]:
        """Return the codes and scales of the blocks of a tile, one run of bytes each, and all of the tables."""
        settings = dict(storage.settings)
        block, nested = int(settings["block"]), int(settings["nested"])
        start, end = _values(tile)
        first, last = start // block, -(-end // block)
        found = {
            WEIGHT: _run("U8", first * block // 2, -(-end // 2)),
            "table": whole("F32", (16,)),
            "absmax": _run("U8" if nested else "F32", first, last),
        }
        if nested:
            found["nested_absmax"] = _run("F32", first // nested, -(-last // nested))
            found["nested_table"] = whole("F32", (256,))
        return found

    def decode(
        self, tile: Tile, parts: Mapping[str, torch.Tensor], out: torch.Tensor, storage: Storage
    ) -> None:
        """Look up the codes two at a time, and multiply each block by its scale."""
        settings = dict(storage.settings)
        block, nested = int(settings["block"]), int(settings["nested"])
        start, end = _values(tile)
        first = start // block
        absmax = parts["absmax"]
        if nested:
            absmax = _absmax(parts, first % nested, nested, float(settings["offset"]))
        values = _looked_up(parts["table"], parts[WEIGHT])[None, : end - first * block]
        for blocks, columns in in_groups(values, block):
            blocks.mul_(absmax[None, columns, None])
        # The matrices of a stack may begin within a block.
        out.view(-1).copy_(values[0, start - first * block :])


def _values(tile: Tile) -> tuple[int, int]:
    """Return which values of the flattened weight a tile has."""
    columns = math.prod(tile.shape) // max(tile.n_rows, 1)
    return tile.start * columns, tile.end * columns


def _run(dtype: str, first: int, last: int) -> PartRange:
    """Return the range of some adjacent entries."""
    size = nbytes_of(dtype, (1,))
    return PartRange(dtype, (last - first,), ((first * size, (last - first) * size),))


def _absmax(parts: Mapping[str, torch.Tensor], skipped: int, nested: int, offset: float) -> torch.Tensor:
    """Return the scales of blocks that are quantised themselves, float32.

    Args:
        parts: of the tile.
        skipped: blocks before those of the tile that the first nested scale belongs to.
        nested: blocks of a nested scale.
        offset: added to each scale.
    """
    codes = parts["absmax"]
    scale = parts["nested_absmax"].repeat_interleave(nested)[skipped : skipped + len(codes)]
    return parts["nested_table"].index_select(0, codes.int()).mul_(scale).add_(offset)


def _looked_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the entries of a table for bytes of two codes: float32, two for each byte."""
    import torch

    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), 1)
    # Two floats are moved as one integer of eight bytes, in a quarter of the time.
    return pairs.view(torch.int64).view(-1).index_select(0, codes.int()).view(torch.float32)

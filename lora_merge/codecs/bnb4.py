"""NF4 and FP4 of bitsandbytes: 4-bit codes of a table, with a scale for each block of the flattened weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_merge.codecs.geometry import in_groups, lines_of, whole
from lora_merge.codecs.lattice import Table
from lora_merge.codecs.stored_grid import Coded, stored_grid
from lora_merge.core.tensor import nbytes_of
from lora_merge.core.weight import WEIGHT, PartRange

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.codecs.grid import Grid
    from lora_merge.core.weight import Storage, Tile


class Bnb4(Coded):
    """``table[code] · absmax`` (bitsandbytes 0.50, ``functional.dequantize_4bit``).

    The first of two codes is in the HIGH half of a byte. Blocks continue from one row to the next.

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
        block = int(settings["block"])
        start, end = _values(tile)
        first = start // block
        absmax = _scales(parts, storage, first)
        values = _looked_up(parts["table"], parts[WEIGHT])[None, : end - first * block]
        for blocks, columns in in_groups(values, block):
            blocks.mul_(absmax[None, columns, None])
        # The matrices of a stack may begin within a block.
        out.view(-1).copy_(values[0, start - first * block :])

    def on_stored(
        self,
        tile: Tile,
        out: Mapping[str, torch.Tensor],
        storage: Storage,
        stored: Mapping[str, torch.Tensor],
    ) -> Grid:
        """Return the grid of the stored table and scales. Of several codes that mean the same the stored one stays, if it is
        one of them: FP4 has two zeros.
        """
        lines, block = lines_of(tile), int(dict(storage.settings)["block"])
        start, end = _values(tile)
        # Values of the first block that belong to the tile before.
        before = start % block
        scale, group = _scales(stored, storage, start // block), block
        # Blocks go on from one line to the next, so every value gets its scale.
        if before or lines.width % block:
            scale, group = scale.repeat_interleave(block)[before : before + end - start], 1
        table = Table.of(stored["table"])

        def unpack() -> torch.Tensor:
            values = _looked_up(stored["table"], stored[WEIGHT])
            return values[before : before + end - start].view(lines.n, lines.width)

        def pack(levels: torch.Tensor) -> None:
            import torch

            meanings = stored["table"].tolist()
            codes = _codes(table, meanings, levels.reshape(-1))
            n_codes = 2 * len(out[WEIGHT])
            # Kept: codes of the tile before in shared bytes, an odd last one, and the stored one of two equal ones.
            if before or len(codes) < n_codes or len(table.levels) < len(meanings):
                kept = _nibbles(stored[WEIGHT])
                own = kept[before : before + len(codes)]
                own.copy_(_kept(meanings, codes, own))
                codes = kept
            pairs = codes.view(torch.int16)
            # The first code is in the high half.
            out[WEIGHT].copy_((pairs << 4 | pairs >> 8).to(torch.uint8))

        return stored_grid(table, pack, unpack, scale.view(lines.n, -1), group=group)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return the codes of bytes, the high half first: uint8, two for each."""
    import torch

    return torch.stack((packed >> 4, packed & 15), 1).view(-1)


def _codes(table: Table, meanings: list[float], levels: torch.Tensor) -> torch.Tensor:
    """Return the codes of levels, uint8 ``[n]``; of codes that mean the same the first.

    Args:
        table: the lattice.
        meanings: of each code.
        levels: float32 ``[n]``.
    """
    import torch

    in_order = [meanings.index(level) for level in table.levels]
    order = torch.tensor(in_order, dtype=torch.uint8, device=levels.device)
    return order.index_select(0, table.positions(levels))


def _kept(meanings: list[float], codes: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Return the stored codes where they mean the same as the others, else these."""
    import torch

    first = torch.tensor([*map(meanings.index, meanings)], dtype=torch.uint8, device=codes.device)
    return stored.where(first.index_select(0, stored.int()) == codes, codes)


def _values(tile: Tile) -> tuple[int, int]:
    """Return which values of the flattened weight a tile has."""
    columns = math.prod(tile.shape) // max(tile.n_rows, 1)
    return tile.start * columns, tile.end * columns


def _run(dtype: str, first: int, last: int) -> PartRange:
    """Return the range of some adjacent entries."""
    size = nbytes_of(dtype, (1,))
    return PartRange(dtype, (last - first,), ((first * size, (last - first) * size),))


def _scales(parts: Mapping[str, torch.Tensor], storage: Storage, first: int) -> torch.Tensor:
    """Return the scales of the blocks of a tile, float32, of which the first has this number."""
    settings = dict(storage.settings)
    nested = int(settings["nested"])
    if not nested:
        return parts["absmax"]
    return _absmax(parts, first % nested, nested, float(settings["offset"]))


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

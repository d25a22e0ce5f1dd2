"""One byte for each value, FP8 or int8, and a scale for each block, row or tensor."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from lora_merge.codecs import fresh_scaled
from lora_merge.codecs.compiled import decode, signed_bytes
from lora_merge.codecs.geometry import by_block, by_line, groups_of, in_groups, lines_of
from lora_merge.codecs.grid import Codes
from lora_merge.codecs.lattice import E4M3, E5M2, Integers
from lora_merge.codecs.stored_grid import Coded, stored_at_once, stored_grid
from lora_merge.codecs.tables import (
    as_floats,
    bytes_of,
    keep_signs_of_zeros_,
    look_up,
    pack_bytes,
    values_of_codes,
)
from lora_merge.core.weight import WEIGHT

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.codecs.geometry import Lines
    from lora_merge.codecs.grid import Grid
    from lora_merge.codecs.lattice import Lattice
    from lora_merge.core.weight import PartRange, Storage, Tile

_SCALE = "scale"

_SIGN = 0x80
"""The sign bit of FP8."""

LATTICES: dict[str, Lattice] = {"F8_E4M3": E4M3, "F8_E5M2": E5M2, "I8": Integers(-128, 127)}
"""What a byte can be, by its dtype."""


class _Settings(NamedTuple):
    """The settings of a storage, by their names there."""

    codes: str
    block_rows: int
    block_columns: int
    scale: str


# Asked for every tile, of a few storages.
@lru_cache
def _settings(storage: Storage) -> _Settings:
    found = dict(storage.settings)
    return _Settings(
        str(found["codes"]), int(found["block_rows"]), int(found["block_columns"]), str(found["scale"])
    )


class Scaled(Coded):
    """``weight`` ``[…, out, in]`` and ``scale``: W = q · s, each in float32, with one scale for each block of a matrix.

    Settings:
        codes: what a byte of the weight is: ``"F8_E4M3"``, ``"F8_E5M2"`` or ``"I8"``. The part may be stored as words.
        block_rows, block_columns: of a block; 0 is the whole axis. The last block of an axis may be cut off.
        scale: ``"F32"``, ``"BF16"``, ``"F16"``, or ``"F8_E8M0"``/``"U8"`` for powers of two.

    The scales are ``⌈out / block_rows⌉ × ⌈in / block_columns⌉`` of each matrix, row by row, whatever axes of size 1 their
    tensor has. In float32 these are the values that transformers' ``Fp8Dequantize``, compressed-tensors 0.20 (``dequantize``),
    ModelOpt 0.47 and torchao 0.18 round to their dtype.
    """

    def alignment(self, shape: tuple[int, ...], n_rows: int, storage: Storage) -> tuple[int, int]:
        """Return ``(1, 1)``: a tile may begin within a block, whose scale both tiles read."""
        del shape, n_rows, storage
        return 1, 1

    def ranges(self, tile: Tile, storage: Storage) -> Mapping[str, PartRange]:
        """Return the codes ``[lines, in]`` and the scales of all blocks that have some of the lines."""
        lines, of = lines_of(tile), _settings(storage)
        return {
            WEIGHT: by_line(lines, bytes_of(of.codes), lines.width),
            _SCALE: by_block(
                lines, bytes_of(of.scale), of.block_rows, groups_of(lines.width, of.block_columns)
            ),
        }

    def decode(
        self, tile: Tile, parts: Mapping[str, torch.Tensor], out: torch.Tensor, storage: Storage
    ) -> None:
        """Multiply each code by the scale of its block. NaN codes and scales stay NaN."""
        lines, of = lines_of(tile), _settings(storage)
        values = out.view(lines.n, lines.width)
        scale = _scale(lines, parts, of)
        table = _table(of, parts[WEIGHT].device)
        codes, is_e4m3 = parts[WEIGHT].view(lines.n, -1), of.codes == "F8_E4M3"
        if decode(codes, table, scale, values, group=of.block_columns, is_e4m3=is_e4m3):
            return
        _levels(parts, of, values)
        for group, columns in in_groups(values, of.block_columns):
            group.mul_(scale[:, columns, None])

    def on_stored(
        self,
        tile: Tile,
        out: Mapping[str, torch.Tensor],
        storage: Storage,
        stored: Mapping[str, torch.Tensor],
    ) -> Grid:
        """Return the grid of the stored scales."""
        lines, of = lines_of(tile), _settings(storage)
        kept = out[WEIGHT].view(lines.n, lines.width)
        scale = _scale(lines, stored, of)

        def unpack() -> torch.Tensor:
            levels = scale.new_empty(lines.n, lines.width)
            _levels(stored, of, levels)
            return levels

        def pack(levels: torch.Tensor) -> None:
            pack_bytes(levels, of.codes, kept)
            if of.codes != "I8":
                keep_signs_of_zeros_(kept, stored[WEIGHT].view(kept.shape), _SIGN)

        # A grid has a row of scales for each line, and `_scale` one row where all share it.
        scale = scale.expand(lines.n, -1)
        found = stored_grid(LATTICES[of.codes], pack, unpack, scale, group=of.block_columns)
        before, levels = stored[WEIGHT].view(kept.shape), _table(of, scale.device)
        codes = Codes.of(kept, 8, stored=before, keeps_signs=of.codes != "I8", levels=levels)
        return stored_at_once(found, scale, codes)

    def fresh(
        self,
        tile: Tile,
        values: torch.Tensor,
        out: Mapping[str, torch.Tensor],
        storage: Storage,
        survey: torch.Tensor | None,
    ) -> Grid:
        """Make scales of the values, see `lora_merge.codecs.fresh_scaled.grid`."""
        del survey
        return fresh_scaled.grid(tile, values, out, storage)

    def fresh_alignment(self, shape: tuple[int, ...], storage: Storage) -> int:
        """Return the rows of a matrix that share a block."""
        return fresh_scaled.fresh_alignment(storage, shape)

    def parts(self, shape: tuple[int, ...], storage: Storage) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Return the codes and the scales, one for each block of each matrix."""
        of, (*stack, rows, width) = _settings(storage), shape
        grid = groups_of(rows, of.block_rows), groups_of(width, of.block_columns)
        return {WEIGHT: (of.codes, shape), _SCALE: (of.scale, (*stack, *grid))}


def _levels(parts: Mapping[str, torch.Tensor], of: _Settings, out: torch.Tensor) -> None:
    """Write what the codes are before any scale, float32 ``[lines, in]``."""
    if of.codes == "I8":
        out.copy_(parts[WEIGHT])
    else:
        look_up(parts[WEIGHT], of.codes, out)


def _table(of: _Settings, device: torch.device) -> torch.Tensor:
    """Return what each byte is before any scale, float32 ``[256]``."""
    return signed_bytes() if of.codes == "I8" else values_of_codes(of.codes, device)


def _scale(lines: Lines, parts: Mapping[str, torch.Tensor], of: _Settings) -> torch.Tensor:
    """Return the scales, float32 ``[lines, groups]``, or ``[1, groups]`` where they are the same for all lines."""
    scale = as_floats(parts[_SCALE], of.scale)
    # One row of scales is the same for all lines, one for each line fits as it is.
    if scale.shape[0] > 1 and of.block_rows != 1:
        scale = scale.index_select(0, lines.block_rows_of(of.block_rows, scale.device))
    return scale

"""One byte for each value, FP8 or int8, and a scale for each block, row or tensor."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from lora_merge.codecs.geometry import by_block, by_line, groups_of, in_groups, lines_of
from lora_merge.codecs.tables import as_floats, bytes_of, look_up
from lora_merge.core.weight import WEIGHT

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.core.weight import PartRange, Storage, Tile

_SCALE = "scale"


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


class Scaled:
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
        if of.codes == "I8":
            values.copy_(parts[WEIGHT])
        else:
            look_up(parts[WEIGHT], of.codes, values)
        scale = as_floats(parts[_SCALE], of.scale)
        # One row of scales is the same for all lines, one for each line fits as it is.
        if scale.shape[0] > 1 and of.block_rows != 1:
            scale = scale.index_select(0, lines.block_rows_of(of.block_rows, out.device))
        for group, columns in in_groups(values, of.block_columns):
            group.mul_(scale[:, columns, None])

"""Plain tensors: BF16, F16 or F32, row by row."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from lora_merge.codecs.grid import Grid
from lora_merge.codecs.lattice import PLAIN
from lora_merge.core.tensor import TORCH_CODES, UNIT_ROUNDOFF, nbytes_of
from lora_merge.core.weight import WEIGHT, PartRange, Survey

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.core.weight import Storage, Tile

_SMALLEST = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149}
"""The smallest subnormal of each dtype: half of it is the error next to zero."""

_LARGEST = {"BF16": (2 - 2.0**-7) * 2.0**127, "F16": 65504.0, "F32": (2 - 2.0**-23) * 2.0**127}


# Asked for every tile, with few different arguments.
@lru_cache
def _row(dtype: str, shape: tuple[int, ...], n_rows: int) -> tuple[int, int]:
    """Return the columns of a weight that is divided into ``n_rows``, and the bytes of one row."""
    columns = prod(shape) // max(n_rows, 1)
    return columns, nbytes_of(dtype, (columns,))


class Dense:
    """One part, ``weight``, in the weight's own shape. Where float32 is stored, values and stored part may be one
    tensor.
    """

    def survey(self, storage: Storage) -> Survey:
        """Return ``"none"``: there is no scale."""
        del storage
        return "none"

    def names(self, name: str, storage: Storage) -> Mapping[str, str]:
        """Return the parameter's own name for the one part."""
        del storage
        return {WEIGHT: name}

    def parts(self, shape: tuple[int, ...], storage: Storage) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Return the one part: the storage's dtype, the weight's shape."""
        return {WEIGHT: (storage.dtype, shape)}

    def alignment(self, shape: tuple[int, ...], n_rows: int, storage: Storage) -> tuple[int, int]:
        """Return ``(1, 1)``: a tile may begin anywhere."""
        del shape, n_rows, storage
        return 1, 1

    def ranges(self, tile: Tile, storage: Storage) -> Mapping[str, PartRange]:
        """Return one range: the rows of a tile are adjacent, ``[rows, columns]``."""
        columns, row_bytes = _row(storage.dtype, tile.shape, tile.n_rows)
        rows = tile.end - tile.start
        span = (tile.start * row_bytes, rows * row_bytes)
        return {WEIGHT: PartRange(storage.dtype, (rows, columns), (span,))}

    def decode(
        self, tile: Tile, parts: Mapping[str, torch.Tensor], out: torch.Tensor, storage: Storage
    ) -> None:
        """Widen stored values to float32, which is exact."""
        del tile, storage
        stored = parts[WEIGHT]
        # Float32 is computed in the buffer that it was read into.
        if stored is not out:
            out.copy_(stored)

    def fresh_alignment(self, shape: tuple[int, ...], storage: Storage) -> int:
        """Return 1: there is no scale."""
        del shape, storage
        return 1

    def look(self, values: torch.Tensor, found: torch.Tensor | None, storage: Storage) -> torch.Tensor:
        """Return the values: `survey` is ``"none"``, so this is never needed."""
        del found, storage
        return values

    def grid(
        self,
        tile: Tile,
        values: torch.Tensor,
        out: Mapping[str, torch.Tensor],
        storage: Storage,
        survey: torch.Tensor | None,
        stored: Mapping[str, torch.Tensor] | None,
    ) -> Grid:
        """Return the numbers of the stored dtype."""
        del tile, values, survey, stored
        kept = out[WEIGHT]

        def keep(levels: torch.Tensor) -> None:
            if levels is not kept:
                kept.copy_(levels.view(kept.shape))

        return Grid(PLAIN[storage.dtype], keep, place=kept)

    def bound(
        self, tile: Tile, values: torch.Tensor, parts: Mapping[str, torch.Tensor], storage: Storage
    ) -> torch.Tensor:
        """Return half a unit in the last place for each value; infinity where rounding may overflow; zero for F32."""
        del tile, storage
        dtype = TORCH_CODES[str(parts[WEIGHT].dtype)]
        if dtype == "F32":
            # Float32 is stored as it is computed.
            return values.new_zeros(())
        size = values.abs()
        # Near zero the spacing is that of subnormals, whatever the value.
        off = (size * UNIT_ROUNDOFF[dtype]).clamp_(min=_SMALLEST[dtype] / 2)
        return off.masked_fill_(size > _LARGEST[dtype], float("inf"))

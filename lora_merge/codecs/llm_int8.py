"""LLM.int8 of bitsandbytes: int8 and the largest magnitude of each row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.codecs.geometry import by_line, lines_of
from lora_merge.codecs.lattice import Integers
from lora_merge.codecs.stored_grid import Coded, stored_grid
from lora_merge.core.weight import WEIGHT

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.codecs.grid import Grid
    from lora_merge.core.weight import PartRange, Storage, Tile

_SCALE = "scale"

_STEP = 7.874015718698502e-3
"""1/127 in float32."""


class LlmInt8(Coded):
    """``weight`` I8 ``[out, in]`` and ``scale`` (``SCB``) F32 ``[out]``: W = q · SCB · 1/127, in float32, from left to right, as
    bitsandbytes 0.50 computes it (``int8_vectorwise_dequant``).
    """

    def alignment(self, shape: tuple[int, ...], n_rows: int, storage: Storage) -> tuple[int, int]:
        """Return ``(1, 1)``: a tile may begin anywhere."""
        del shape, n_rows, storage
        return 1, 1

    def ranges(self, tile: Tile, storage: Storage) -> Mapping[str, PartRange]:
        """Return the codes ``[lines, in]`` and the scales ``[lines, 1]``."""
        del storage
        lines = lines_of(tile)
        return {WEIGHT: by_line(lines, "I8", lines.width), _SCALE: by_line(lines, "F32", 1)}

    def decode(
        self, tile: Tile, parts: Mapping[str, torch.Tensor], out: torch.Tensor, storage: Storage
    ) -> None:
        """Multiply each code by the scale of its row, then by 1/127."""
        del storage
        lines = lines_of(tile)
        out.view(lines.n, lines.width).copy_(parts[WEIGHT]).mul_(parts[_SCALE]).mul_(_STEP)

    def on_stored(
        self,
        tile: Tile,
        out: Mapping[str, torch.Tensor],
        storage: Storage,
        stored: Mapping[str, torch.Tensor],
    ) -> Grid:
        """Return the grid of the stored scales."""
        del storage
        lines = lines_of(tile)
        return stored_grid(
            # Without -128, which bitsandbytes never makes.
            Integers(-127, 127),
            lambda levels: out[WEIGHT].view(lines.n, lines.width).copy_(levels),
            stored[WEIGHT].view(lines.n, lines.width).float,
            stored[_SCALE].view(lines.n, 1) * _STEP,
        )

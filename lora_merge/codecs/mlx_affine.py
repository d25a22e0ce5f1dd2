"""Unsigned integers of 2 to 8 bits in 32-bit words with a scale and a bias for each group, as MLX writes them (``affine``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.codecs.bits import pack, unpack, whole_codes, words_of
from lora_merge.codecs.geometry import by_line, groups_of, in_groups, lines_of
from lora_merge.codecs.lattice import Integers
from lora_merge.codecs.stored_grid import Coded, stored_grid
from lora_merge.core.weight import WEIGHT

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.codecs.grid import Grid
    from lora_merge.core.weight import PartRange, Storage, Tile


class MlxAffine(Coded):
    """``code · scale + bias`` (MLX 0.32, ``dequantize``), where the product is rounded before the sum.

    Parts, of a weight ``[…, out, in]``:
        weight: U32 ``[…, out, in · bits / 32]``.
        scale, bias: floats ``[…, out, in / group]``.
    """

    def alignment(self, shape: tuple[int, ...], n_rows: int, storage: Storage) -> tuple[int, int]:
        """Return ``(1, 1)``: each line is packed by itself."""
        del shape, n_rows, storage
        return 1, 1

    def ranges(self, tile: Tile, storage: Storage) -> Mapping[str, PartRange]:
        """Return the ranges of the three parts: each is one run of bytes. Words are wanted as int32."""
        settings, lines = dict(storage.settings), lines_of(tile)
        by_group = by_line(lines, str(settings["scale"]), groups_of(lines.width, int(settings["group"])))
        words = by_line(lines, "I32", words_of(lines.width, int(settings["bits"])))
        return {WEIGHT: words, "scale": by_group, "bias": by_group}

    def decode(
        self, tile: Tile, parts: Mapping[str, torch.Tensor], out: torch.Tensor, storage: Storage
    ) -> None:
        """Unpack the codes, multiply them by the scale of their group, and add its bias."""
        settings, lines = dict(storage.settings), lines_of(tile)
        codes = out.view(lines.n, lines.width)
        codes.copy_(unpack(parts[WEIGHT], int(settings["bits"]), lines.width))
        scale, bias = parts["scale"].float(), parts["bias"].float()
        for values, columns in in_groups(codes, int(settings["group"])):
            values.mul_(scale[:, columns, None]).add_(bias[:, columns, None])

    def on_stored(
        self,
        tile: Tile,
        out: Mapping[str, torch.Tensor],
        storage: Storage,
        stored: Mapping[str, torch.Tensor],
    ) -> Grid:
        """Return the grid of the stored scales and biases."""
        settings, lines = dict(storage.settings), lines_of(tile)
        bits = int(settings["bits"])
        return stored_grid(
            Integers(0, (1 << bits) - 1),
            lambda levels: out[WEIGHT].copy_(pack(whole_codes(levels), bits)),
            lambda: unpack(stored[WEIGHT], bits, lines.width).float(),
            stored["scale"].float(),
            bias=stored["bias"].float(),
            group=int(settings["group"]),
        )

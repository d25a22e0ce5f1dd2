"""INT4 of NVIDIA ModelOpt's AWQ export (``W4A16_AWQ``): two rows share a byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.codecs.geometry import by_line, groups_of, in_groups, lines_of, whole
from lora_merge.codecs.lattice import Integers
from lora_merge.codecs.stored_grid import Coded, stored_grid
from lora_merge.core.weight import WEIGHT, PartRange

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.codecs.grid import Grid
    from lora_merge.core.weight import Storage, Tile


class ModelOptAwq(Coded):
    """``code · scale · pre_quant_scale`` (ModelOpt 0.47, ``pack_int4_in_uint8``). Codes are signed, in two's complement.

    Engines multiply the activations by ``pre_quant_scale`` (AWQ could not fold it into the layer before). Here the weight is
    multiplied by it instead, so that it fits plain activations.

    Parts, of a weight ``[…, out, in]``, out even:
        weight: U8 ``[…, out / 2, in]``; the low half of a byte is the even row.
        scale: floats ``[…, out, in / group]``.
        pre_quant_scale: floats ``[in]``; absent where the setting ``pre`` is empty.
    """

    def alignment(self, shape: tuple[int, ...], n_rows: int, storage: Storage) -> tuple[int, int]:
        """Return the two rows that share a byte."""
        del shape, n_rows, storage
        return 2, 1

    def ranges(self, tile: Tile, storage: Storage) -> Mapping[str, PartRange]:
        """Return the ranges of codes and scales, one run of bytes each, and all of ``pre_quant_scale``."""
        settings, lines = dict(storage.settings), lines_of(tile)
        first, last = lines.start // 2, -(-lines.end // 2)
        span = (first * lines.width, (last - first) * lines.width)
        groups = groups_of(lines.width, int(settings["group"]))
        found = {
            WEIGHT: PartRange("U8", (last - first, lines.width), (span,)),
            "scale": by_line(lines, str(settings["scale"]), groups),
        }
        if settings["pre"]:
            found["pre_quant_scale"] = whole(str(settings["pre"]), (lines.width,))
        return found

    def decode(
        self, tile: Tile, parts: Mapping[str, torch.Tensor], out: torch.Tensor, storage: Storage
    ) -> None:
        """Unpack two rows from each row of bytes, and multiply them by the scales."""
        settings, lines = dict(storage.settings), lines_of(tile)
        codes = out.view(lines.n, lines.width)
        _unpack(parts[WEIGHT], codes)
        scale = parts["scale"].float()
        for values, columns in in_groups(codes, int(settings["group"])):
            values.mul_(scale[:, columns, None])
        if settings["pre"]:
            codes.mul_(parts["pre_quant_scale"].float())

    def on_stored(
        self,
        tile: Tile,
        out: Mapping[str, torch.Tensor],
        storage: Storage,
        stored: Mapping[str, torch.Tensor],
    ) -> Grid:
        """Return the grid of the stored scales, each times the ``pre_quant_scale`` of its column."""
        settings, lines = dict(storage.settings), lines_of(tile)
        scale, group = stored["scale"].float(), int(settings["group"])
        if settings["pre"]:
            # The product differs from column to column, so each column becomes a group.
            scale = scale.repeat_interleave(group or lines.width, 1)[:, : lines.width]
            scale, group = scale * stored["pre_quant_scale"].float(), 1

        def unpack() -> torch.Tensor:
            levels = scale.new_empty(lines.n, lines.width)
            _unpack(stored[WEIGHT], levels)
            return levels

        return stored_grid(
            Integers(-8, 7), lambda levels: _pack(levels, out[WEIGHT]), unpack, scale, group=group
        )


def _unpack(packed: torch.Tensor, out: torch.Tensor) -> None:
    """Write the codes of two rows for each row of bytes: float32 ``[lines, in]``."""
    import torch

    packed = packed.view(torch.int8)
    # A shift to the right fills with the sign.
    out[0::2].copy_((packed << 4) >> 4)
    out[1::2].copy_((packed >> 4)[: out.shape[0] // 2])


def _pack(levels: torch.Tensor, out: torch.Tensor) -> None:
    """Write bytes of two rows each, the inverse of `_unpack`."""
    import torch

    codes = levels.to(torch.int8)
    out.copy_((codes[0::2] & 15).view(torch.uint8))
    out[: len(codes) // 2].bitwise_or_((codes[1::2] << 4).view(torch.uint8))

"""E2M1 codes of four bits, with a scale for each group: MXFP4 and NVFP4."""

from __future__ import annotations

from functools import lru_cache
from math import nan
from typing import TYPE_CHECKING, NamedTuple

from lora_merge.codecs import fresh_fp4
from lora_merge.codecs.compiled import decode
from lora_merge.codecs.geometry import by_line, groups_of, in_groups, lines_of, whole
from lora_merge.codecs.grid import Codes
from lora_merge.codecs.lattice import E2M1
from lora_merge.codecs.stored_grid import Coded, stored_at_once, stored_grid
from lora_merge.codecs.tables import (
    E2M1_SIGNS,
    as_floats,
    keep_signs_of_zeros_,
    look_up_e2m1,
    pack_e2m1_,
    values_of_e2m1,
)
from lora_merge.core.weight import WEIGHT

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.codecs.grid import Grid
    from lora_merge.core.weight import PartRange, Storage, Survey, Tile

_SCALE, _GLOBAL = "scale", "global"


class _Settings(NamedTuple):
    """The settings of a storage."""

    group: int
    scale: str
    """A dtype code."""

    of_tensor: str
    """``global``: what is done with the scale of the whole tensor."""


# Asked for every tile, of a few storages.
@lru_cache
def _settings(storage: Storage) -> _Settings:
    found = dict(storage.settings)
    return _Settings(int(found["group"]), f"F8_{found['scale']}", str(found["global"]))


class Fp4(Coded):
    """``weight`` of two codes in each byte, the low nibble first, ``scale`` for each group along ``in``, perhaps ``global``
    for the whole tensor.

    Settings:
        group: values of a group: 32 for MXFP4, 16 for NVFP4.
        scale: ``"E8M0"`` or ``"E4M3"``.
        global: ``"none"``: W = e2m1 · s; ``"divide"``: e2m1 · (s / g), as compressed-tensors 0.20 stores it; ``"multiply"``:
            e2m1 · (s · g), as ModelOpt 0.47 does. All in float32.

    The codes may be stored as U8, I8 or U32: the bytes are the same.
    """

    def alignment(self, shape: tuple[int, ...], n_rows: int, storage: Storage) -> tuple[int, int]:
        """Return ``(1, 1)``: a tile may begin anywhere."""
        del shape, n_rows, storage
        return 1, 1

    def ranges(self, tile: Tile, storage: Storage) -> Mapping[str, PartRange]:
        """Return the codes ``[lines, in/2]`` and scales ``[lines, groups]``, both as bytes; ``global`` F32 ``[1]`` if any."""
        lines, of = lines_of(tile), _settings(storage)
        found = {
            WEIGHT: by_line(lines, "U8", lines.width // 2),
            _SCALE: by_line(lines, "U8", groups_of(lines.width, of.group)),
        }
        if of.of_tensor != "none":
            found[_GLOBAL] = whole("F32", (1,))
        return found

    def decode(
        self, tile: Tile, parts: Mapping[str, torch.Tensor], out: torch.Tensor, storage: Storage
    ) -> None:
        """Multiply each code by the scale of its group, to which the global scale is applied first."""
        lines, of = lines_of(tile), _settings(storage)
        values = out.view(lines.n, lines.width)
        scale = _scale(parts, of)
        if decode(parts[WEIGHT].view(lines.n, -1), values_of_e2m1(), scale, values, group=of.group):
            return
        look_up_e2m1(parts[WEIGHT], values)
        for group, columns in in_groups(values, of.group):
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
        scale = _scale(stored, of)

        def unpack() -> torch.Tensor:
            levels = scale.new_empty(lines.n, lines.width)
            look_up_e2m1(stored[WEIGHT], levels)
            return levels

        def pack(levels: torch.Tensor) -> None:
            pack_e2m1_(levels, out[WEIGHT])
            keep_signs_of_zeros_(out[WEIGHT], stored[WEIGHT], E2M1_SIGNS)

        kept, before = (part.view(lines.n, -1) for part in (out[WEIGHT], stored[WEIGHT]))
        codes = Codes.of(kept, 4, stored=before, keeps_signs=True, levels=values_of_e2m1())
        return stored_at_once(stored_grid(E2M1, pack, unpack, scale, group=of.group), scale, codes)

    def fresh(
        self,
        tile: Tile,
        values: torch.Tensor,
        out: Mapping[str, torch.Tensor],
        storage: Storage,
        survey: torch.Tensor | None,
    ) -> Grid:
        """Make scales of the values, see `lora_merge.codecs.fresh_fp4.grid`."""
        return fresh_fp4.grid(tile, values, out, storage, survey)

    def survey(self, storage: Storage) -> Survey:
        """Return ``"tensor"`` where there is a scale for all values."""
        return fresh_fp4.survey(storage)

    def look(self, values: torch.Tensor, found: torch.Tensor | None, storage: Storage) -> torch.Tensor:
        """Return the largest size of all values so far, see `lora_merge.codecs.fresh_fp4.look`."""
        del storage
        return fresh_fp4.look(values, found)

    def parts(self, shape: tuple[int, ...], storage: Storage) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Return the codes, the scales (E8M0 as plain bytes), perhaps the scale of the whole tensor."""
        of, (*lines, width) = _settings(storage), shape
        # compressed-tensors stores powers of two as uint8.
        scale = "U8" if of.scale == "F8_E8M0" else of.scale
        found = {
            WEIGHT: ("U8", (*lines, width // 2)),
            _SCALE: (scale, (*lines, groups_of(width, of.group))),
        }
        return found if of.of_tensor == "none" else found | {_GLOBAL: ("F32", (1,))}


def _scale(parts: Mapping[str, torch.Tensor], of: _Settings) -> torch.Tensor:
    """Return the scales with that of the whole tensor applied, float32 ``[lines, groups]``."""
    scale = as_floats(parts[_SCALE], of.scale)
    if of.of_tensor == "divide":
        shared = parts[_GLOBAL]
        # Values divided by infinity would be zeros, which nothing notices.
        scale.div_(shared.masked_fill(shared.isinf(), nan))
    elif of.of_tensor == "multiply":
        scale.mul_(parts[_GLOBAL])
    return scale

"""Making scales anew: what quantises values that were stored in full precision. One entry for each codec that can."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.codecs import fresh_fp4, fresh_packed, fresh_scaled
from lora_merge.codecs.fp4 import Fp4
from lora_merge.codecs.geometry import whole
from lora_merge.codecs.mxfp4_experts import Mxfp4Experts
from lora_merge.codecs.packed_int import PackedInt
from lora_merge.codecs.scaled import Scaled

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.codecs.grid import Grid
    from lora_merge.core.weight import PartRange, Storage, Survey, Tile

_SHAPE = "weight_shape"
_SCALED, _FP4, _PACKED, _EXPERTS = Scaled(), Fp4(), PackedInt(), Mxfp4Experts()


def fresh_alignment(storage: Storage, shape: tuple[int, ...]) -> int:
    """Return the multiple of rows of a matrix at which a tile has to begin where its scales are new."""
    if storage.codec == "scaled":
        return fresh_scaled.fresh_alignment(storage, shape)
    return fresh_packed.fresh_alignment(storage, shape) if storage.codec == "packed_int" else 1


def fresh_ranges(tile: Tile, storage: Storage) -> Mapping[str, PartRange]:
    """Return, by role, the share of every part of a tile: those that a decoder reads, and the shape that it does not."""
    if storage.codec == "scaled":
        return _SCALED.ranges(tile, storage)
    if storage.codec == "fp4":
        return _FP4.ranges(tile, storage)
    if storage.codec == "mxfp4_experts":
        return _EXPERTS.ranges(tile, storage)
    return {**_PACKED.ranges(tile, storage), _SHAPE: whole("I64", (len(tile.shape),))}


def fresh_survey(storage: Storage) -> Survey:
    """Return what has to be known of all values before the first tile."""
    return fresh_fp4.survey(storage) if storage.codec == "fp4" else "none"


def fresh_look(values: torch.Tensor, found: torch.Tensor | None) -> torch.Tensor:
    """Return what is known after one more tile, where `fresh_survey` is ``"tensor"``; see `fresh_fp4.look`."""
    return fresh_fp4.look(values, found)


def fresh_grid(
    tile: Tile,
    values: torch.Tensor,
    out: Mapping[str, torch.Tensor],
    storage: Storage,
    survey: torch.Tensor | None = None,
) -> Grid:
    """Write new scales for a tile of a matrix, and return its grid, whose `Grid.keep` fills the codes.

    Args:
        tile: which rows; see `fresh_alignment`.
        values: float32 ``[rows, in]``, rounded to bfloat16 as a dense output would have them; they are not changed.
        out: the parts to fill, shaped as `fresh_ranges` says.
        storage: of a scheme (`lora_merge.quantised.schemes`).
        survey: what `fresh_look` has returned at last, the largest of all fused weights; None where nothing is needed.
    """
    assert tile.start % fresh_alignment(storage, tile.shape) == 0, "a tile begins within a block"
    if storage.codec == "scaled":
        return fresh_scaled.grid(tile, values, out, storage)
    if storage.codec == "fp4":
        return fresh_fp4.grid(tile, values, out, storage, survey)
    if storage.codec == "mxfp4_experts":
        return _EXPERTS.grid(tile, values, out, storage, survey, None)
    return fresh_packed.grid(tile, values, out, storage)

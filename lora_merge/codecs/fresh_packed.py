"""New scales and zeros for integers of four bits in words, as compressed-tensors makes them (``pack-quantized``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.codecs.bfloat16 import divided, largest, quotient
from lora_merge.codecs.bits import codes_at_word_edges, pack
from lora_merge.codecs.geometry import lines_of
from lora_merge.codecs.grid import Codes, Grid
from lora_merge.codecs.lattice import Integers
from lora_merge.core.weight import WEIGHT

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.core.weight import Storage, Tile

_SCALE, _ZERO, _SHAPE = "scale", "zero", "weight_shape"
_BITS = 4
_INT4 = Integers(-8, 7)
_EMPTY = 2.0**-7
"""What compressed-tensors puts in the place of a scale that is zero: the epsilon of bfloat16."""


def fresh_alignment(storage: Storage, shape: tuple[int, ...]) -> int:
    """Return the multiple of rows of the matrix at which a word of zeros begins; 1 without zeros."""
    del shape
    settings = dict(storage.settings)
    return codes_at_word_edges(int(settings["bits"])) if settings[_ZERO] else 1


def grid(tile: Tile, values: torch.Tensor, out: Mapping[str, torch.Tensor], storage: Storage) -> Grid:
    """Write the scales of a tile, its zeros, and the shape of the weight; return the grid.

    Args:
        tile: which rows of a matrix. It begins at a multiple of `fresh_alignment`, and ends at one or with the matrix.
        values: float32 ``[rows, in]``.
        out: the parts to fill, shaped as `lora_merge.codecs.packed_int.PackedInt.ranges` says; ``weight_shape`` I64 ``[2]``.
        storage: four bits, scales in BF16, groups that fill a line; with zeros or without.

    Reference:
        compressed-tensors 0.20 ``calculate_qparams``, ``quantize`` and ``pack_to_int32``.
    """
    import torch

    lines, settings = lines_of(tile), dict(storage.settings)
    group, lattice = int(settings["group"]), _INT4
    numbers = values.view(lines.n, lines.width)
    zero = None
    if settings[_ZERO]:
        scale, zero = _asymmetric(numbers, group)
        # A clone, since `contiguous` leaves the strides of a matrix with one column as they are.
        codes = (zero.float() + 8.0).to(torch.uint8).T.clone(memory_format=torch.contiguous_format)
        out[_ZERO].copy_(pack(codes, _BITS).T)
    else:
        scale = divided(largest(numbers, 1, group), 7.5)
        scale = scale.masked_fill_(scale == 0, _EMPTY)
    out[_SCALE].copy_(scale)
    # A sample of a dry run writes nothing, and has only the parts that are decoded.
    if _SHAPE in out:
        out[_SHAPE].copy_(torch.tensor(tile.shape))

    def keep(levels: torch.Tensor) -> None:
        out[WEIGHT].copy_(pack(levels.add_(8.0).to(torch.uint8), _BITS))

    return Grid(
        lattice,
        keep,
        scale=scale.float(),
        zero=None if zero is None else zero.float(),
        group=group,
        quotient=lambda found: quotient(found, scale, group, zero),
        codes=Codes.of(out[WEIGHT], _BITS, offset=8),
    )


def _asymmetric(values: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zeros of groups, bfloat16 ``[lines, groups]``, each step rounded to it."""
    import torch

    # Float32 has faster reductions, and bfloat16 is exact in it.
    groups = values.to(torch.bfloat16).float().view(len(values), -1, group)
    lowest = groups.amin(-1).clamp_(max=0.0).to(torch.bfloat16)
    highest = groups.amax(-1).clamp_(min=0.0).to(torch.bfloat16)
    scale = divided(highest - lowest, 15.0)
    # A group of zeros has no quotient; the library's cast of NaN to an integer is 0.
    zero = (-8.0 - lowest / scale).clamp_(-8.0, 7.0).nan_to_num_(nan=0.0).round_()
    return scale.masked_fill_(scale == 0, _EMPTY), zero

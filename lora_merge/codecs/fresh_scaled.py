"""New scales for codes of eight bits: FP8 in blocks and rows, INT8 in rows, MXFP8.

The dtype of the scales says whose arithmetic makes them: F32 transformers' (``fp8``), BF16 and U8 that of compressed-tensors. In
each the values are those of a model in bfloat16, so they are rounded to it first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.codecs.bfloat16 import divided, largest, quotient
from lora_merge.codecs.geometry import in_groups, lines_of
from lora_merge.codecs.grid import Codes, Grid
from lora_merge.codecs.lattice import E4M3, Integers
from lora_merge.codecs.powers import exponents, powers_of
from lora_merge.core.weight import WEIGHT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from lora_merge.codecs.geometry import Lines
    from lora_merge.core.weight import Storage, Tile

_SCALE = "scale"
_INT8 = Integers(-128, 127)
_EMPTY = 2.0**-7
"""What compressed-tensors puts in the place of a scale that is zero: the epsilon of bfloat16."""

_POWERS = ("U8", "F8_E8M0")
_OFFSET = 8
"""⌊log2(448)⌋: how far the exponent of the largest E4M3 number is above 0."""


def fresh_alignment(storage: Storage, shape: tuple[int, ...]) -> int:
    """Return the multiple of rows of the matrix at which a tile has to begin, so that no block is in two tiles."""
    del shape
    return max(int(dict(storage.settings)["block_rows"]), 1)


def grid(tile: Tile, values: torch.Tensor, out: Mapping[str, torch.Tensor], storage: Storage) -> Grid:
    """Write the scales of a tile, and return its grid.

    Args:
        tile: which rows of a matrix. It begins at a multiple of `fresh_alignment`, and ends at one or with the matrix.
        values: float32 ``[rows, in]``.
        out: the parts to fill, shaped as `lora_merge.codecs.scaled.Scaled.ranges` says.
        storage: F8_E4M3 with scales in F32 and BF16 for blocks or rows, or in U8 for groups of 32; I8 with BF16 for rows.

    Reference:
        transformers 5.23 ``Fp8Quantize``; compressed-tensors 0.20 ``calculate_qparams`` and ``quantize``.
    """
    lines, settings = lines_of(tile), dict(storage.settings)
    rows, columns = int(settings["block_rows"]), int(settings["block_columns"])
    size = largest(values.view(lines.n, lines.width), rows, columns)
    keep = _keep(out[WEIGHT], str(settings["codes"]))
    codes = Codes.of(out[WEIGHT].view(lines.n, -1), 8)
    if settings[_SCALE] == "F32":
        return _of_transformers(size, lines, (rows, columns), out[_SCALE], keep, codes)
    if settings[_SCALE] in _POWERS:
        exponent = exponents(size, _OFFSET)
        out[_SCALE].copy_(exponent)
        scale = powers_of(exponent)
    else:
        # In bfloat16, as the library divides; a scale that underflows is one that is zero.
        scale = divided(size, 448.0 if settings["codes"] == "F8_E4M3" else 127.5)
        scale = scale.masked_fill_(scale == 0, _EMPTY)
        out[_SCALE].copy_(scale)
    by_line = _by_line(scale, lines, rows)
    lattice = E4M3 if settings["codes"] == "F8_E4M3" else _INT8
    return Grid(
        lattice,
        keep,
        scale=by_line.float(),
        group=columns,
        quotient=lambda found: quotient(found, by_line, columns),
        codes=codes,
    )


def _of_transformers(
    size: torch.Tensor,
    lines: Lines,
    block: tuple[int, int],
    out: torch.Tensor,
    keep: Callable[[torch.Tensor], None],
    codes: Codes | None,
) -> Grid:
    """Return the grid of ``fp8``: values are multiplied by 448 / a, and the inverse of that is stored."""
    import torch

    # As torch divides a number by a tensor: an inverse, rounded, and a product, rounded again.
    factor = size.float().reciprocal_().mul_(448.0)
    # A block of zeros has the factor 1. So has one whose factor overflows: transformers would make NaN of it.
    factor = factor.masked_fill_(factor == torch.inf, 1.0)
    inverse = factor.reciprocal()
    out.copy_(inverse)
    factor, inverse = (_by_line(found, lines, block[0]) for found in (factor, inverse))

    def product(values: torch.Tensor) -> torch.Tensor:
        found = values.to(torch.bfloat16).float()
        for part, columns in in_groups(found, block[1]):
            part.mul_(factor[:, columns, None])
        return found

    return Grid(E4M3, keep, scale=inverse, group=block[1], quotient=product, codes=codes)


def _by_line(scale: torch.Tensor, lines: Lines, rows: int) -> torch.Tensor:
    """Return scales of blocks as scales of lines: ``[lines, groups]``."""
    return scale if rows == 1 else scale.index_select(0, lines.block_rows_of(rows, scale.device))


def _keep(out: torch.Tensor, codes: str) -> Callable[[torch.Tensor], None]:
    import torch

    stored = out if codes == "I8" else out.view(torch.float8_e4m3fn)

    def keep(levels: torch.Tensor) -> None:
        stored.copy_(levels.view(stored.shape))

    return keep

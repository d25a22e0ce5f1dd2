"""New scales for E2M1 codes, as compressed-tensors makes them: MXFP4 and NVFP4 (W4A16)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.codecs.bfloat16 import divided, largest, largest_of_all, quotient
from lora_merge.codecs.geometry import in_groups, lines_of
from lora_merge.codecs.grid import Codes, Grid
from lora_merge.codecs.lattice import E2M1
from lora_merge.codecs.powers import exponents, powers_of
from lora_merge.codecs.tables import pack_e2m1_
from lora_merge.core.weight import WEIGHT

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.core.weight import Storage, Survey, Tile

_SCALE, _GLOBAL = "scale", "global"
_OFFSET = 2
_LARGEST_SCALES = 448.0 * 6.0
"""The largest scale (E4M3) times the largest level."""

_EMPTY = 0.125
"""What compressed-tensors puts in the place of an E4M3 scale that is zero."""


def survey(storage: Storage) -> Survey:
    """Return ``"tensor"`` for NVFP4, whose global scale depends on all values, of fused weights too."""
    return "tensor" if dict(storage.settings)["global"] != "none" else "none"


def look(values: torch.Tensor, found: torch.Tensor | None) -> torch.Tensor:
    """Return the largest size seen, rounded to bfloat16: float32 ``[1]``. That of fused weights is the largest of theirs.

    Args:
        values: float32 ``[rows, in]``.
        found: what this returned for the tiles before; None at the first.
    """
    import torch

    size = largest_of_all(values)
    return size if found is None else torch.maximum(size, found)


def global_scale(size: torch.Tensor) -> torch.Tensor:
    """Return what scales are multiplied by to fill the range of E4M3: float32 ``[1]``.

    Args:
        size: the largest size of all values that share it, float32 ``[1]``, as `look` returns it.

    Reference:
        compressed-tensors 0.20 ``generate_gparam``, which computes it in bfloat16.
    """
    import torch

    limited = size.to(torch.bfloat16).clamp(min=torch.finfo(torch.bfloat16).tiny)
    # The division of a number by a tensor: a reciprocal, rounded, and a product, rounded again.
    found = limited.reciprocal().mul_(_LARGEST_SCALES).float()
    return found.masked_fill_(found == torch.inf, 1.0)


def grid(
    tile: Tile,
    values: torch.Tensor,
    out: Mapping[str, torch.Tensor],
    storage: Storage,
    survey: torch.Tensor | None = None,
) -> Grid:
    """Write the scales of a tile, and return its grid.

    Args:
        tile: which rows.
        values: float32 ``[rows, in]``.
        out: the parts to fill, shaped as `lora_merge.codecs.fp4.Fp4.ranges` says.
        storage: MXFP4 (groups of 32, E8M0) or NVFP4 (groups of 16, E4M3, ``global`` divides). Groups fill a line.
        survey: for NVFP4, what `look` has returned at last, the largest of all fused weights.

    Reference:
        compressed-tensors 0.20 ``calculate_qparams``, ``cast_to_fp4`` and ``pack_fp4_to_uint8``.
    """
    lines, settings = lines_of(tile), dict(storage.settings)
    group = int(settings["group"])
    size = largest(values.view(lines.n, lines.width), 1, group)

    codes = Codes.of(out[WEIGHT].view(lines.n, -1), 4)

    def keep(levels: torch.Tensor) -> None:
        pack_e2m1_(levels, out[WEIGHT])

    if settings["global"] == "none":
        exponent = exponents(size, _OFFSET)
        out[_SCALE].copy_(exponent)
        power = powers_of(exponent)
        return Grid(
            E2M1,
            keep,
            scale=power.float(),
            group=group,
            quotient=lambda found: quotient(found, power, group),
            codes=codes,
        )
    assert survey is not None, "a global scale depends on all values: look at them first"
    overall = global_scale(survey)
    out[_GLOBAL].copy_(overall.view(out[_GLOBAL].shape))
    scale = _scales(size, overall, out[_SCALE])
    return Grid(
        E2M1,
        keep,
        scale=scale,
        group=group,
        quotient=lambda found: _by_float32(found, scale, group),
        codes=codes,
    )


def _scales(size: torch.Tensor, overall: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write the E4M3 scales of groups, and return what the decoder makes of them: float32 ``[lines, groups]``."""
    import torch

    wanted = divided(size, 6.0).float().mul_(overall).clamp_(max=448.0)
    stored = wanted.to(torch.float8_e4m3fn)
    scale = stored.float()
    scale = scale.masked_fill_(scale == 0, _EMPTY)
    out.view(torch.float8_e4m3fn).copy_(scale)
    return scale.div_(overall)


def _by_float32(values: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    """Return quotients of values that are rounded to bfloat16, in float32 without negative zeros."""
    import torch

    found = values.to(torch.bfloat16).float()
    for part, columns in in_groups(found, group):
        part.div_(scale[:, columns, None])
    return found.add_(0.0)

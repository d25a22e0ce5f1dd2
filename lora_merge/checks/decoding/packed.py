"""Integers of a few bits packed along the row: compressed-tensors, MLX, ModelOpt's AWQ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.checks.decoding.decoder import (
    FLOAT32,
    Levels,
    Lines,
    StoredRows,
    gathered,
    integers,
    products,
    setting,
    text,
)
from lora_merge.core.weight import WEIGHT

if TYPE_CHECKING:
    import torch


def packed_int(stored: StoredRows) -> Levels:
    """Return ``(q - z) · s`` of compressed-tensors' ``pack-quantized``. Codes and zeros are stored with 2ᵇ⁻¹ added to them."""
    lines, bits = Lines.of(stored), setting(stored, "bits")
    half = 1 << bits - 1
    codes = stored.part(WEIGHT, lines.numbers, lines.count).fields(bits)[:, : lines.width].double().sub_(half)
    scale = stored.part("scale", lines.numbers, lines.count).floats()
    index = _index(stored, lines) if setting(stored, "g_idx") else None

    def spread(groups: torch.Tensor) -> torch.Tensor:
        if index is not None:
            return groups.gather(1, index)
        return groups.repeat_interleave(setting(stored, "group") or lines.width, 1)[:, : lines.width]

    zero = spread(_zeros(stored, lines, bits)).double() if setting(stored, "zero") else 0.0
    return Levels(codes, integers(-half, half - 1), spread(scale), zero).split(lines, stored)


def _index(stored: StoredRows, lines: Lines) -> torch.Tensor:
    """Return the group of each value, int64 ``[lines, width]``, as the part ``g_idx`` says.

    An index of -1 was never filled, so that the groups are in order.
    """
    import torch

    size = setting(stored, "group") or lines.width
    in_order = torch.arange(lines.width) // size
    raw, places = gathered(stored, "g_idx", [n // lines.height for n in lines.numbers], lines.n_matrices)
    index = raw.integers()[places]
    return torch.where(index.amin(1, keepdim=True) < 0, in_order, index)


def _zeros(stored: StoredRows, lines: Lines, bits: int) -> torch.Tensor:
    """Return the zero point of each group of each line, int64 ``[lines, groups]``.

    They are packed along the outputs: number i of a column begins at bit i · bits of the column's words.
    """
    import torch

    height = -(-lines.height * bits // 32)
    starts = [(n // lines.height * height, n % lines.height * bits) for n in lines.numbers]
    low = [first + bit // 32 for first, bit in starts]
    # The last bit of it may be in the next word.
    high = [first + (bit + bits - 1) // 32 for first, bit in starts]
    raw, places = gathered(stored, "zero", [*low, *high], lines.n_matrices * height)
    lows, highs = raw.words()[places].chunk(2)
    shifts = torch.tensor([bit % 32 for _, bit in starts]).view(-1, 1)
    own = (lows >> shifts) | torch.where(shifts + bits > 32, highs << 32 - shifts, 0)
    return (own & (1 << bits) - 1) - (1 << bits - 1)


def mlx_affine(stored: StoredRows) -> Levels:
    """Return ``q · scale + bias``; MLX 0.32 ``dequantize``, mode ``affine``."""
    lines, bits = Lines.of(stored), setting(stored, "bits")
    codes = stored.part(WEIGHT, lines.numbers, lines.count).fields(bits)[:, : lines.width]
    scale, bias = (_spread(stored, lines, role) for role in ("scale", "bias"))
    return Levels(codes.double(), integers(0, (1 << bits) - 1), scale, bias=bias).split(lines, stored)


def _spread(stored: StoredRows, lines: Lines, role: str) -> torch.Tensor:
    """Return the value of each element's group, ``[lines, width]``."""
    groups = stored.part(role, lines.numbers, lines.count).floats()
    return groups.repeat_interleave(setting(stored, "group"), 1)[:, : lines.width]


def affine_slack(stored: StoredRows, values: torch.Tensor) -> torch.Tensor:
    """Return the error of a float32 product and a float32 sum.

    The product may be larger than the value: it is the value less the bias.
    """
    lines = Lines.of(stored)
    bias = lines.as_rows(_spread(stored, lines, "bias"), stored)
    return products(2)(stored, values) + FLOAT32 * bias.abs()


def modelopt_awq(stored: StoredRows) -> Levels:
    """Return ``q · s · pre_quant_scale``; ModelOpt 0.47 ``W4A16_AWQ``.

    A byte has two outputs, the low half the even one, each in two's complement.
    """
    import torch

    lines = Lines.of(stored)
    raw, places = gathered(stored, WEIGHT, [n // 2 for n in lines.numbers], lines.count // 2)
    shifts = torch.tensor([4 * (n % 2) for n in lines.numbers]).view(-1, 1)
    halves = raw.content[places].long() >> shifts & 15
    codes = torch.where(halves >= 8, halves - 16, halves)
    scale = _spread(stored, lines, "scale")
    if text(stored, "pre"):
        scale = scale * stored.whole("pre_quant_scale")
    return Levels(codes.double(), integers(-8, 7), scale).split(lines, stored)

"""Bases on grids of several kinds, and merges whose values are to be rounded onto them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lora_merge.codecs.grid import Grid
from lora_merge.codecs.lattice import E2M1, E4M3, PLAIN, Integers
from lora_merge.rounding.basis import row_space

GRIDS = ("bf16", "f16", "fp8", "int4", "int4-asymmetric", "int4-act-order", "int8", "nvfp4")


class InSpan(NamedTuple):
    """What is left of an adapter's effect, in float64."""

    relative_error: float
    share_kept: float


def in_span(stored, values, base, basis, *, along=False):
    if along:
        stored, values, base = stored.t(), values.t(), base.t()
    turned = basis.double().t()
    error, wanted = (values.double() - stored.double()) @ turned, (values.double() - base.double()) @ turned
    kept = ((wanted - error) * wanted).sum() / wanted.square().sum()
    return InSpan(float(error.norm() / wanted.norm()), float(kept))


def make_grid(kind, weight):  # noqa: PLR0911 - a table
    """Return the grid that a weight would be stored on."""
    rows, columns = weight.shape

    def keep(levels):
        raise AssertionError("a rounding does not store")

    def largest(group):
        return weight.view(rows, -1, group).abs().amax(-1).clamp(min=1e-12)

    match kind:
        case "bf16" | "f16":
            return Grid(PLAIN[kind.upper()], keep)
        case "fp8":
            blocks = weight.view(rows // 64, 64, columns // 64, 64).abs().amax((1, 3)) / 448
            return Grid(E4M3, keep, scale=blocks.repeat_interleave(64, 0), group=64)
        case "int4":
            return Grid(Integers(-8, 7), keep, scale=largest(32) / 7, group=32)
        case "int4-asymmetric":
            low, high = (end(weight.view(rows, -1, 32), -1).values for end in (torch.min, torch.max))
            scale = (high - low) / 15
            return Grid(Integers(0, 15), keep, scale=scale, zero=(-low / scale).round(), group=32)
        case "int4-act-order":
            order = torch.randperm(columns, generator=torch.Generator().manual_seed(9)).div(
                32, rounding_mode="floor"
            )
            return Grid(
                Integers(-8, 7), keep, scale=largest(32) / 7, bias=largest(32) / 100, group=order.int()
            )
        case "int8":
            return Grid(Integers(-128, 127), keep, scale=largest(columns) / 127)
        case "nvfp4":
            return Grid(E2M1, keep, scale=largest(16) / 6, group=16)
    raise AssertionError(kind)


def case(kind, rows=192, columns=256, rank=8, size=0.02, seed=0):
    """Return a base that lies on its grid, a merged weight, the grid and the basis; ``size`` is ‖Δ‖ / ‖W‖."""
    generator = torch.Generator().manual_seed(seed)
    weight, a, b = (
        torch.randn(shape, generator=generator) for shape in ((rows, columns), (rank, columns), (rows, rank))
    )
    weight *= 0.02
    grid = make_grid(kind, weight)
    base = grid.values(grid.nearest(weight))
    delta = b @ a
    return base, base + delta * (size * 0.02 / delta.std()), grid, row_space([a])

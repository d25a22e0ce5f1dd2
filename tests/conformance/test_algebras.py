"""What every algebra keeps, for each member of `ALGEBRAS`: tiles of rows make the whole, in any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from lora_merge.core.adapter import DeltaSpec
from lora_merge.core.tensor import Region, TensorRef
from lora_merge.deltas import ALGEBRAS

N_OUT, N_IN, RANK, SCALE = 96, 80, 5, 0.7


class Sample(NamedTuple):
    """An algebra, a weight for it, and what comes of the two."""

    algebra: Any
    factors: dict[str, torch.Tensor]
    weight: torch.Tensor
    exact: Callable[[torch.Tensor], torch.Tensor]
    """The formula, in float64."""


def low_rank(transposed):
    """Return the factors of a sample, and its formula in float64."""
    generator = torch.Generator().manual_seed(1)
    factors = {
        "A": torch.randn(RANK, N_IN, generator=generator),
        "B": torch.randn(N_OUT, RANK, generator=generator),
    }
    delta = SCALE * factors["B"].double() @ factors["A"].double()
    return factors, lambda weight: weight.double() + (delta.T if transposed else delta)


MAKERS = {"low_rank": low_rank}
each = pytest.mark.parametrize(
    ("kind", "transposed"), [(kind, transposed) for kind in ALGEBRAS for transposed in (False, True)]
)


@pytest.fixture
def sample():
    """Return a function: kind, transposed → a fresh sample, always the same."""

    def make(kind, transposed):
        factors, exact = MAKERS[kind](transposed)
        refs = {
            role: TensorRef(role, "F32", tuple(tensor.shape), "", 0, 0) for role, tensor in factors.items()
        }
        spec = DeltaSpec(kind, "module.weight", refs, SCALE, Region(transposed=transposed))
        shape = (N_IN, N_OUT) if transposed else (N_OUT, N_IN)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        return Sample(ALGEBRAS[kind](spec, factors), factors, weight, exact)

    return make


@each
def test_the_whole_weight_follows_the_formula(kind, transposed, sample):
    made = sample(kind, transposed)
    wanted = made.exact(made.weight)
    made.algebra.apply(made.weight, 0, len(made.weight))
    # RANK products, a scaling and a sum, each rounded by 2⁻²⁴ of values that stay below 64
    assert (made.weight.double() - wanted).abs().max() <= (RANK + 2) * 2.0**-24 * 64


@each
@pytest.mark.parametrize("tile_rows", [16, 32, 40, 64])
def test_tiles_in_any_order_make_the_same_bits_as_the_whole(kind, transposed, tile_rows, sample):
    whole, tiled = sample(kind, transposed), sample(kind, transposed)
    n_rows = len(whole.weight)
    whole.algebra.apply(whole.weight, 0, n_rows)
    for start in reversed(range(0, n_rows, tile_rows)):
        end = min(start + tile_rows, n_rows)
        assert end - start >= 16  # a handful of rows has other rounding, and no plan makes such a tile
        tiled.algebra.apply(tiled.weight[start:end], start, end)
    assert torch.equal(tiled.weight, whole.weight)


@each
def test_a_tile_is_changed_in_place_and_nothing_beside_it(kind, transposed, sample):
    made = sample(kind, transposed)
    before = made.weight.clone()
    made.algebra.apply(made.weight[16:48], 16, 48)
    assert torch.equal(made.weight[:16], before[:16])
    assert torch.equal(made.weight[48:], before[48:])
    assert (made.weight[16:48] != before[16:48]).all()


@each
def test_a_delta_is_the_same_however_often_it_was_applied(kind, transposed, sample):
    made = sample(kind, transposed)
    factors = {role: tensor.clone() for role, tensor in made.factors.items()}
    first, second = made.weight.clone(), made.weight.clone()
    made.algebra.apply(first, 0, len(first))
    made.algebra.apply(second, 0, len(second))
    assert torch.equal(first, second)
    assert all(torch.equal(made.factors[role], tensor) for role, tensor in factors.items())

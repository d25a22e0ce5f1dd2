"""Stochastic rounding."""

from __future__ import annotations

import pytest
import torch

from lora_merge.codecs.grid import Grid
from lora_merge.codecs.lattice import E2M1, PLAIN, Integers
from lora_merge.rounding.stochastic import round_stochastic


def grid(lattice, **parts):
    return Grid(lattice, lambda levels: None, **parts)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.5, 0.75, 0.999, -2.3, 6.2])
def test_the_mean_is_the_value(value):
    n = 1 << 20
    levels = round_stochastic(torch.full((1024, 1024), value), grid(Integers(-8, 7)), 3, "w", 0)
    exact = torch.tensor(value).double()
    assert set(levels.unique().tolist()) <= {exact.floor().item(), exact.floor().item() + 1}
    share = exact - exact.floor()
    # Five standard deviations of a mean of n draws.
    assert abs(levels.double().mean() - exact) <= 5 * (share * (1 - share) / n).sqrt() + 1e-12


def test_a_level_stays():
    levels = torch.tensor([[-6.0, -0.5, 0.0, 1.5, 6.0]])
    assert torch.equal(round_stochastic(levels, grid(E2M1), 0, "w", 0), levels)


def test_beyond_the_ends_is_the_end():
    levels = round_stochastic(torch.tensor([[-9.0, 6.1, 1e30]]), grid(E2M1), 0, "w", 0)
    assert levels.tolist() == [[-6.0, 6.0, 6.0]]


def test_tiles_do_not_matter():
    values = torch.randn(96, 4096, generator=torch.Generator().manual_seed(0))
    bf16 = grid(PLAIN["BF16"])
    whole = round_stochastic(values, bf16, 1, "w", 0)
    for cuts in ((1, 95), (32, 32, 32), (70, 26)):
        start, found = 0, []
        for part in values.split(cuts):
            found.append(round_stochastic(part, bf16, 1, "w", start * 4096))
            start += len(part)
        assert torch.equal(torch.cat(found), whole)


def test_seed_and_key_change_the_draws():
    values, integers = torch.full((64, 64), 0.5), grid(Integers(-8, 7))
    first = round_stochastic(values, integers, 1, "a", 0)
    for seed, key in ((2, "a"), (1, "b")):
        other = round_stochastic(values, integers, seed, key, 0)
        assert 0.4 < (first == other).double().mean() < 0.6


def test_elements_beyond_32_bits_have_draws_of_their_own():
    values, integers = torch.full((64, 64), 0.5), grid(Integers(-8, 7))
    first = round_stochastic(values, integers, 1, "a", 0)
    later = round_stochastic(values, integers, 1, "a", 1 << 32)
    assert 0.4 < (first == later).double().mean() < 0.6
    across = round_stochastic(values, integers, 1, "a", (1 << 32) - 2048)
    assert torch.equal(across[32:], later[:32])


def test_scales_and_zeros_are_those_of_the_grid():
    scaled = grid(
        Integers(0, 15), scale=torch.tensor([[0.5, 2.0]]), zero=torch.tensor([[8.0, 8.0]]), group=4096
    )
    values = torch.full((1, 8192), 0.6)
    stored = scaled.values(round_stochastic(values, scaled, 5, "w", 0))
    assert abs(stored[:, :4096].mean() - 0.6) < 5 * 0.25 / 64
    assert abs(stored[:, 4096:].mean() - 0.6) < 5 * 1.0 / 64
    assert set(stored[:, :4096].unique().tolist()) == {0.5, 1.0}


def test_not_a_number_does_not_fail():
    round_stochastic(torch.tensor([[float("nan"), float("inf"), 1.0]]), grid(PLAIN["BF16"]), 0, "w", 0)

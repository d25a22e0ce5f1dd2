"""Rounding to a lattice of floats, against torch's own casts."""

from __future__ import annotations

import pytest
import torch

from lora_merge.codecs.lattice import E4M3, E5M2

DTYPES = {"E4M3": (E4M3, torch.float8_e4m3fn), "E5M2": (E5M2, torch.float8_e5m2)}


def numbers(n):
    """Return numbers of all sizes that eight bits can hold and some beyond, ties and zeros of both signs among them."""
    generator = torch.Generator().manual_seed(0)
    powers = torch.randint(-20, 18, (n,), generator=generator)
    found = torch.ldexp(torch.randn(n, generator=generator), powers)
    found[::5] = torch.ldexp(
        torch.randint(-32, 33, (len(found[::5]),), generator=generator).float(), powers[::5]
    )
    found[::7], found[1::7] = 0.0, -0.0
    return found


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("n", [1, 1000, (1 << 18) + 3])
def test_the_nearest_level_is_that_of_a_cast(name, n):
    lattice, dtype = DTYPES[name]
    values = numbers(n)
    wanted = values.clamp(*lattice.ends).to(dtype).float()
    found = lattice.nearest_(values)
    assert found is values
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))  # the sign of zero counts


def test_a_view_with_gaps_is_rounded_in_place():
    values = numbers(600).view(20, 30)
    wanted = values.clone()
    E4M3.nearest_(wanted)
    E4M3.nearest_(values[:, 3:9])
    assert torch.equal(values[:, 3:9], wanted[:, 3:9])
    assert not torch.equal(values, wanted)

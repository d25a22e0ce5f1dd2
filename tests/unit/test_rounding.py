"""Rounding once, from float64 to what is stored."""

from __future__ import annotations

import pytest
import torch

from lora_merge.checks.rounding import rounded

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e4, 1e-7, 1e-38, 1e-40])
def test_what_float32_holds_is_rounded_as_torch_does_it(dtype, size):
    values = (torch.randn(1000, generator=torch.Generator().manual_seed(1)) * size).clamp(-6e4, 6e4)
    assert torch.equal(rounded(values.double(), dtype), values.to(TYPES[dtype]).double())


@pytest.mark.parametrize("dtype", TYPES)
def test_every_exponent_is_rounded_as_by_its_definition(dtype):
    bits, smallest = {"BF16": (8, -133), "F16": (11, -24), "F32": (24, -149)}[dtype]
    draws = torch.rand(2200, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 0.5
    values = torch.ldexp(draws, torch.arange(-1090, 1110).clamp(max=1024).view(-1, 1)).flatten()
    values = torch.cat([values, torch.tensor([0.0, -0.0, 5e-324, torch.inf, -torch.inf, torch.nan]).double()])
    spacings = (torch.frexp(values).exponent - bits).clamp(min=smallest)
    wanted = torch.ldexp(torch.ldexp(values, -spacings).round(), spacings)
    found = rounded(values, dtype)
    assert torch.equal(found.nan_to_num(nan=1.5), wanted.nan_to_num(nan=1.5))
    assert torch.equal(found.signbit(), wanted.signbit())


@pytest.mark.parametrize(("dtype", "bits"), [("BF16", 8), ("F16", 11)])
def test_a_value_just_above_a_tie_is_rounded_once(dtype, bits):
    just_above = torch.tensor([1 + 2.0**-bits + 2.0**-40], dtype=torch.float64)
    assert rounded(just_above, dtype).item() == 1 + 2.0 ** (1 - bits)
    assert just_above.to(TYPES[dtype]).item() == 1  # torch goes through float32


@pytest.mark.parametrize("dtype", TYPES)
def test_an_order_is_kept(dtype):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(2), dtype=torch.float64).sort().values
    found = rounded(values, dtype)
    assert bool((found.diff() >= 0).all())

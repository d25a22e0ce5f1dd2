"""Places in a sorted table, by leading bits: those of a binary search, for every number."""

from __future__ import annotations

import pytest
import torch

from lora_merge.checks.searching import places

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
E5M2 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2).to(torch.float64)
TABLES = {
    "e4m3": E4M3[E4M3.isfinite()].unique(),
    "e5m2": E5M2[E5M2.isfinite()].unique(),
    "int8": torch.arange(-128, 128, dtype=torch.float64),
    "int4": torch.arange(-8, 8, dtype=torch.float64),
    "e2m1": torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64),
    "crowded": torch.linspace(1, 1.001, 500, dtype=torch.float64),
    "far": torch.tensor(
        [float("-inf"), *(-(2.0**n) for n in range(40, 0, -1)), 0.0, float("inf")], dtype=torch.float64
    ),
}


def asked(table: torch.Tensor) -> torch.Tensor:
    """Return numbers of all kinds: those of the table, their neighbours, those between them, random ones, and odd ones."""
    inf = torch.tensor(float("inf"), dtype=torch.float64)
    finite = table[table.isfinite()]
    random = torch.randn(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    odd = torch.tensor(
        [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 5e-324, -5e-324, 1e308, -1e308],
        dtype=torch.float64,
    )
    near = [torch.nextafter(finite, inf), torch.nextafter(finite, -inf), (finite[1:] + finite[:-1]) / 2]
    return torch.cat([table, *near, random, random * 300, random * 1e-4, odd])


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_a_place_is_that_of_a_binary_search(name, right):
    table = TABLES[name]
    for kind in (table, (table[1:] + table[:-1]) / 2):
        if kind.isnan().any():
            continue
        numbers = asked(kind)
        assert torch.equal(places(kind, numbers, right=right), torch.searchsorted(kind, numbers, right=right))


def test_the_shape_of_the_numbers_is_kept_and_they_need_not_be_contiguous():
    numbers = asked(TABLES["e4m3"])[:600].view(20, 30).t()
    found = places(TABLES["e4m3"], numbers)
    assert found.shape == (30, 20)
    assert torch.equal(found, torch.searchsorted(TABLES["e4m3"], numbers.contiguous()))

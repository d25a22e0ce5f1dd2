"""The nearest level and the gap around a number, by leading bits: those of a search, for every number."""

from __future__ import annotations

import pytest
import torch

from lora_merge.checks.nearing import gaps, has_growing_gaps, nearest_level
from tests.unit.test_searching import TABLES, asked

NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0]
FINITE = {name: table for name, table in TABLES.items() if table.isfinite().all()}
FINITE["nf4"] = torch.tensor(NF4, dtype=torch.float64)
FINITE["halves"] = torch.arange(-3.5, 4.0, dtype=torch.float64)


def numbers_of(table):
    """Return numbers of all kinds, at and beside the levels and the middles between two."""
    found = torch.cat([asked(table), asked((table[1:] + table[:-1]) / 2)])
    return found[~found.isnan()]


@pytest.mark.parametrize("name", FINITE)
def test_the_nearest_level_is_that_of_a_search(name):
    table = FINITE[name]
    numbers = numbers_of(table)
    middles = (table[1:] + table[:-1]) / 2
    assert torch.equal(nearest_level(table, numbers), table[torch.searchsorted(middles, numbers)])


@pytest.mark.parametrize("name", FINITE)
def test_the_gap_is_that_of_a_search(name):
    table = FINITE[name]
    numbers = numbers_of(table)
    below = (torch.searchsorted(table, numbers, right=True) - 1).clamp(0, len(table) - 2)
    assert torch.equal(gaps(table, numbers).expand_as(numbers), table.diff()[below])


def test_gaps_that_grow_are_known():
    assert all(has_growing_gaps(FINITE[name]) for name in ("e4m3", "e5m2", "int8", "int4", "e2m1", "nf4"))
    # The gap at the middle is larger than both beside it.
    assert not has_growing_gaps(torch.tensor([0.0, 1.0, 3.0, 4.0], dtype=torch.float64))


def test_a_table_of_one_level_has_no_gaps():
    table, numbers = (
        torch.tensor([2.0], dtype=torch.float64),
        torch.tensor([-1.0, 2.0, 5.0], dtype=torch.float64),
    )
    assert nearest_level(table, numbers).tolist() == [2.0, 2.0, 2.0]
    assert gaps(table, numbers).expand_as(numbers).tolist() == [0.0, 0.0, 0.0]
    assert not has_growing_gaps(table)

"""Verdicts on stored values: those of the limits on both sides, for values of all kinds."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from lora_merge.checks.bounds import Wanted
from lora_merge.checks.decoding import Levels
from lora_merge.checks.decoding.raw import e2m1, table_of
from lora_merge.core.plan import Merge, Rounding
from lora_merge.core.tensor import TensorRef
from lora_merge.core.view import View
from lora_merge.core.weight import DENSE, Storage, Weight
from tests import limits

INF, NAN = float("inf"), float("nan")
ROWS, COLUMNS = 48, 512
TABLES = {
    "int4": torch.arange(-8, 8, dtype=torch.float64),
    "uint4": torch.arange(16, dtype=torch.float64),
    "int8": torch.arange(-128, 128, dtype=torch.float64),
    "e4m3": table_of("F8_E4M3"),
    "e5m2": table_of("F8_E5M2"),
    "e2m1": e2m1(),
    "uneven": torch.tensor([-1.0, -0.7, -0.69, 0.0, 1e-30, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64),
}
ROUNDINGS = [None, Rounding("adapter"), Rounding("stochastic")]
SCALES = [1.0, -0.25, 0.013, 3e-5, 2.0**-126, 2.0**-149, 1e-320, 1e30, 0.0, -0.0, INF, NAN]


def merge(target, *, rounding=None, on_stored_grid=False):
    """Return a merge into a storage, of which only the rounding is asked."""
    weight = Weight.dense(TensorRef("w", "F32", (ROWS, COLUMNS), "file", 0, 4 * ROWS * COLUMNS))
    view = View.of((ROWS, COLUMNS))
    return Merge(weight, target, (), view, rounding=rounding, on_stored_grid=on_stored_grid)


def drawn(table, random, *, has_zero):
    """Return stored levels, what was wanted of them, and by how much that may be off: near and far, ties, and numbers that are none."""
    shape = (ROWS, COLUMNS)
    level = table[torch.randint(len(table), shape, generator=random)]
    scale = torch.tensor(SCALES, dtype=torch.float64)[torch.randint(len(SCALES), (ROWS, 8), generator=random)]
    scale[: ROWS // 2] = torch.rand(ROWS // 2, 8, generator=random, dtype=torch.float64) + 0.01
    scale = scale.repeat_interleave(COLUMNS // 8, 1)
    zero = bias = 0.0
    if has_zero:
        zero = torch.randint(-3, 4, shape, generator=random).double()
        bias = torch.randn(shape, generator=random, dtype=torch.float64)
    stored = Levels(level, table, scale, zero, bias)
    moves = torch.tensor(
        [0.0, 0.5, -0.5, 1.0, 3.999, 4.0, 4.001, 4.5, -4.5, 5.0, 9.0, -100.0, 1e300], dtype=torch.float64
    )
    by = moves[torch.randint(len(moves), shape, generator=random)]
    by += torch.randn(shape, generator=random, dtype=torch.float64) * 10.0 ** -torch.randint(
        0, 18, shape, generator=random
    )
    gaps = torch.cat([table.diff(), table.diff()[-1:]])[torch.searchsorted(table, level)]
    exact = stored.meant(level + by * gaps)
    odd = torch.rand(shape, generator=random)
    exact[odd < 0.01] = INF
    exact[odd > 0.99] = NAN
    exact[(odd > 0.5) & (odd < 0.51)] = 0.0
    off = exact.abs() * 10.0 ** -torch.randint(3, 12, shape, generator=random)
    strange = torch.rand(shape, generator=random)
    off[strange < 0.01], off[strange > 0.99] = INF, NAN
    return stored, exact, off


def same(one, other):
    """Return whether two results are the same: bit for bit but for the sign of zero, NaN being NaN."""
    return torch.equal(one.nan_to_num(nan=12345.0, posinf=1e308), other.nan_to_num(nan=12345.0, posinf=1e308))


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda r: r.method if r else "nearest")
@pytest.mark.parametrize("name", TABLES)
def test_a_verdict_is_that_of_the_limits(name, rounding):
    random = torch.Generator().manual_seed(3)
    masks = [torch.ones(1, 1, dtype=torch.bool), torch.rand(ROWS, 1, generator=random) < 0.5]
    n_found = 0
    for on_grid, scale, has_zero, is_moved in product((True, False), ("BF16", "F32"), (True, False), masks):
        op = merge(
            Storage("packed_int", "I32", (("scale", scale),)), rounding=rounding, on_stored_grid=on_grid
        )
        stored, exact, off = drawn(TABLES[name], random, has_zero=has_zero)
        # Whole rows of ordinary values too, which one comparison decides.
        for rows in (slice(0, ROWS), slice(0, ROWS // 2)):
            one = Levels(
                *(
                    part[rows] if isinstance(part, torch.Tensor) and part is not stored.table else part
                    for part in (stored.level, stored.table, stored.scale, stored.zero, stored.bias)
                )
            )
            own = is_moved if len(is_moved) == 1 else is_moved[rows]
            found = Wanted(op, one, exact[rows], off[rows]).is_explained(own)
            assert torch.equal(found, limits.is_explained(op, one, exact[rows], off[rows], is_moved=own))
            n_found += int(found.sum())
    assert n_found


@pytest.mark.parametrize("name", TABLES)
def test_the_nearest_numbers_and_the_gaps_are_those_of_a_search(name):
    random = torch.Generator().manual_seed(4)
    op = merge(Storage("packed_int", "I32"), rounding=Rounding("adapter"), on_stored_grid=True)
    for has_zero in (True, False):
        stored, exact, off = drawn(TABLES[name], random, has_zero=has_zero)
        # What is not finite has been refused before.
        exact = exact.nan_to_num(0.25, 0.25, 0.25)
        stored.scale.nan_to_num_(1.0, 1.0, 1.0)
        wanted = Wanted(op, stored, exact, off)
        assert same(wanted.nearest(), limits.nearest_values(op, stored, exact))
        gaps, inside = wanted.steps()
        expected = limits.gaps_at(op, stored, exact)
        assert torch.equal(inside == 0, expected.isinf())
        assert torch.equal((gaps * inside)[inside > 0], expected[inside > 0])


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda r: r.method if r else "nearest")
def test_plain_numbers_have_the_same_limits(rounding):
    random = torch.Generator().manual_seed(5)
    op = merge(Storage(DENSE, "BF16"), rounding=rounding)
    exact = torch.randn(ROWS, COLUMNS, generator=random, dtype=torch.float64)
    off = exact.abs() * 1e-6
    stored = Levels(
        (exact + 0.01 * torch.randn(ROWS, COLUMNS, generator=random, dtype=torch.float64)).bfloat16().double()
    )
    is_moved = torch.rand(ROWS, 1, generator=random) < 0.5
    wanted = Wanted(op, stored, exact, off)
    found = wanted.is_explained(is_moved)
    assert torch.equal(found, limits.is_explained(op, stored, exact, off, is_moved=is_moved))
    assert 0 < int(found.sum()) < found.numel()
    assert torch.equal(wanted.nearest(), limits.nearest_values(op, stored, exact))
    gaps, inside = wanted.steps()
    assert inside is None
    assert torch.equal(gaps, limits.gaps_at(op, stored, exact))


def test_a_gap_between_smaller_ones_is_not_the_reach_of_numbers_that_may_be_beside_it():
    fine = torch.linspace(0, 3, 301, dtype=torch.float64)
    op = merge(Storage("bnb4", "U8"), rounding=Rounding("adapter"))
    level = torch.tensor([[-2.0, -0.1, 0.0, 1.0, 1.12, 3.0]], dtype=torch.float64)
    stored = Levels(level, torch.cat([fine - 3, fine + 1]), torch.ones_like(level))
    # Anything from -0.1 to 1.1, where levels are 0.01 apart: the gap from 0 to 1 is not a step of it.
    wanted = Wanted(op, stored, torch.full_like(level, 0.5), torch.full_like(level, 0.6))
    found = wanted.is_explained(torch.ones(1, 1, dtype=torch.bool))
    assert found.tolist() == [[False, True, True, True, True, False]]
    assert torch.equal(
        found, limits.is_explained(op, stored, wanted.exact, wanted.off, is_moved=torch.tensor([[True]]))
    )

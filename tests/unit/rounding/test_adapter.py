"""Rounding that keeps the adapter."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_merge.codecs.grid import Grid
from lora_merge.codecs.lattice import PLAIN, Integers
from lora_merge.native.library import hidden
from lora_merge.rounding.adapter import round_adapter
from lora_merge.rounding.bands import REACH, Memory
from lora_merge.rounding.basis import row_space
from lora_merge.rounding.feedback import band_rows, damping_for
from lora_merge.rounding.schedule import schedule_of
from tests.grids import GRIDS, case, in_span


def reach_of(lattice, numbers):
    if isinstance(lattice, Integers):
        return torch.full_like(numbers, REACH)
    return numbers.abs().clamp(min=2.0**lattice.smallest) * 2.0**-lattice.mantissa_bits * REACH / 2


def slowly(values, grid, basis, damping):
    """The rule in float64, column after column, of `schedule_of`'s λ."""
    schedule = schedule_of(basis, damping)
    values, basis = values.double(), basis.double()
    n = values.shape[1]
    groups = grid.group if isinstance(grid.group, torch.Tensor) else torch.arange(n) // (grid.group or n)
    ones = torch.ones(len(values), int(groups.max()) + 1, dtype=torch.float64)
    scale = (ones if grid.scale is None else grid.scale.double())[:, groups]
    zero = (0 * ones if grid.zero is None else grid.zero.double())[:, groups]
    bias = (0 * ones if grid.bias is None else grid.bias.double())[:, groups]
    numbers = (values - bias) / scale + zero
    levels, total = numbers.clone(), torch.zeros(len(values), len(basis), dtype=torch.float64)

    reach = reach_of(grid.lattice, numbers)

    def choose(j, shift):
        limited = (shift / scale[:, j]).clamp(-reach[:, j], reach[:, j])
        return grid.lattice.nearest_((numbers[:, j] - limited).float()).double()

    first = 0
    for size, pull in (
        (size, pull) for steps in schedule.panels for size, pull in zip(steps.sizes, steps.pulls, strict=True)
    ):
        before = total.clone()
        for j in range(first, first + size):
            levels[:, j] = choose(j, before @ pull[j - first].double())
            total += torch.outer((levels[:, j] - numbers[:, j]) * scale[:, j], basis[:, j])
        first += size
    for sweep in schedule.sweeps:
        first = n - sum(sweep.sizes)
        for size, pull in zip(sweep.sizes, sweep.pulls, strict=True):
            before = total.clone()
            for j in range(first, first + size):
                own = torch.outer((levels[:, j] - numbers[:, j]) * scale[:, j], basis[:, j])
                levels[:, j] = choose(j, (before - own) @ pull[j - first].double())
                total += torch.outer((levels[:, j] - numbers[:, j]) * scale[:, j], basis[:, j]) - own
            first += size
    return levels.float(), total


def plainly(values, grid, basis, damping):
    """The loop of GPTQ with a constant λ, in float64, for grids without groups or with scales alone."""
    n = values.shape[1]
    scale = (torch.ones(len(values), 1) if grid.scale is None else grid.scale).double()[
        :, torch.arange(n) // (grid.group or n)
    ]
    numbers = grid.numbers(values).double()
    total, levels = torch.zeros(len(values), len(basis), dtype=torch.float64), numbers.clone()
    for j in range(n):
        q = basis[:, j].double()
        shift = (total @ q) / (damping + q @ q)
        levels[:, j] = grid.lattice.nearest_((numbers[:, j] - shift / scale[:, j]).float()).double()
        total += torch.outer((levels[:, j] - numbers[:, j]) * scale[:, j], q)
    return levels.float()


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("shape", [(192, 128), (64, 512)])
def test_levels_are_those_of_the_slow_rule(kind, shape):
    _, values, grid, basis = case(kind, *shape)
    levels, error = round_adapter(values, grid, schedule_of(basis, 0.05))
    slow, total = slowly(values, grid, basis, 0.05)
    # Where a value lies on a threshold within float32's rounding, its row goes on differently from there.
    assert (levels != slow).any(1).double().mean() < 0.05
    assert (levels != slow).double().mean() < (1e-3 if kind not in {"bf16", "f16"} else 5e-3)
    same = (levels == slow).all(1)
    assert (error.double() - total)[same].norm() < 1e-4 * (values.double() @ basis.double().T).norm()


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int4", "nvfp4"])
def test_less_is_lost_at_about_the_noise_of_a_small_constant_damping(kind):
    _, values, grid, basis = case(kind)
    (error, noise), (plain_error, plain_noise) = (
        (difference @ basis.double().T, difference)
        for levels in (
            round_adapter(values, grid, schedule_of(basis, damping_for(8, 256)))[0],
            plainly(values, grid, basis, 0.01),
        )
        for difference in [grid.values(levels).double() - values.double()]
    )
    assert error.norm() < 0.6 * plain_error.norm()
    assert noise.norm() < 1.05 * plain_noise.norm()


@pytest.mark.parametrize("kind", GRIDS)
def test_the_adapter_is_kept_where_nearest_loses_it(kind):
    base, values, grid, basis = case(kind, 256, 512, size=0.003 if kind[-1] in "68" else 0.02)
    levels, _ = round_adapter(values, grid, schedule_of(basis, damping_for(8, 512)))
    found = in_span(grid.values(levels), values, base, basis)
    nearest = in_span(grid.values(grid.nearest(values)), values, base, basis)
    assert found.relative_error < 0.15 * nearest.relative_error
    assert abs(found.share_kept - 1) < 0.05


@pytest.mark.parametrize("kind", GRIDS)
def test_the_error_is_that_of_the_levels(kind):
    _, values, grid, basis = case(kind, 100 if kind != "fp8" else 128)
    levels, error = round_adapter(values, grid, schedule_of(basis, 0.05))
    exact = (grid.values(levels).double() - values.double()) @ basis.double().T
    assert error.dtype == torch.float32
    # Some hundred roundings of values whose size is that of the weights.
    assert (error.double() - exact).abs().max() < 256 * 2.0**-24 * values.abs().max()


@pytest.mark.parametrize("kind", GRIDS)
def test_every_level_is_one_of_the_lattice(kind):
    _, values, grid, basis = case(kind)
    levels, _ = round_adapter(values, grid, schedule_of(basis, 0.05))
    assert torch.equal(grid.lattice.nearest_(levels.clone()), levels)


def cut(grid, rows):
    def part(found):
        return None if found is None else found[rows]

    return Grid(grid.lattice, grid.keep, part(grid.scale), part(grid.zero), part(grid.bias), grid.group)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "columns"), [("bf16", 160), ("int4", 160), ("int4-act-order", 160), ("bf16", 2720)]
)
def test_bands_in_one_call_are_bands_one_by_one(kind, columns):
    size = band_rows(columns)
    rows = 2 * size + 136
    _, values, grid, basis = case(kind, rows, columns)
    levels, error = round_adapter(values, grid, schedule_of(basis, 0.05))
    for cuts in ((0, size, 2 * size, rows), (0, 2 * size, rows), (0, size, rows)):
        for start, end in pairwise(cuts):
            part = values[start:end].clone()
            found, own = round_adapter(part, cut(grid, slice(start, end)), schedule_of(basis, 0.05))
            assert torch.equal(found, levels[start:end])
            assert torch.equal(own, error[start:end])


@pytest.mark.parametrize("kind", GRIDS)
def test_along_the_lines_is_the_transposed_problem(kind):
    _, values, grid, basis = case(kind, 192, 128)
    # A grid of values [in, out] has its groups along out. One that is the same for all lines has the same transposed.
    if kind in {"bf16", "f16"}:
        turned = grid
    else:
        grid = Grid(grid.lattice, grid.keep, scale=torch.full((192, 1), 0.007))
        turned = Grid(grid.lattice, grid.keep, scale=torch.full((128, 3), 0.007), group=64)
    # Compiled code, which sums in another order, has no such direction.
    with hidden():
        levels, error = round_adapter(values, grid, schedule_of(basis, 0.05))
    along, own = round_adapter(values.t().contiguous(), turned, schedule_of(basis, 0.05), along=True)
    assert torch.equal(along.t(), levels)
    assert torch.equal(own, error)


def test_along_the_lines_each_value_has_the_scale_of_its_own_group():
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((128, 192), (4, 128), (192, 4)))
    grid = Grid(
        Integers(-8, 7), lambda levels: None, scale=weight.view(128, 6, 32).abs().amax(-1) / 7, group=32
    )
    base, delta = grid.values(grid.nearest(weight)), (b @ a).t() * 0.01
    basis = row_space([a])
    levels, error = round_adapter(base + delta, grid, schedule_of(basis, 0.1), along=True)
    exact = (grid.values(levels).double() - (base + delta).double()).t() @ basis.double().T
    assert (error.double() - exact).abs().max() < 256 * 2.0**-24 * weight.abs().max()
    assert in_span(grid.values(levels), base + delta, base, basis, along=True).relative_error < 0.1


def steps_of(grid, values):
    """The larger gap beside each number, in float64."""
    numbers = grid.numbers(values)
    first, last = grid.lattice.ends
    inside = numbers.clamp(first, last)
    below, above = grid.lattice.neighbours(inside)
    before, _ = grid.lattice.neighbours(torch.nextafter(below, torch.tensor(float("-inf"))))
    at_level = torch.where(inside == below, below - before, 0.0)
    return torch.maximum(above - below, at_level).double()


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["bf16", "f16", "int4", "nvfp4", "int8"]),
    st.floats(1e-4, 3.0),
    st.floats(0.001, 0.5),
    st.integers(0, 1000),
)
def test_no_value_is_moved_further_than_the_reach(kind, size, damping, seed):
    _, values, grid, basis = case(kind, 32, 64, size=size, seed=seed)
    levels, _ = round_adapter(values, grid, schedule_of(basis, damping))
    numbers = grid.numbers(values)
    far = steps_of(grid, values) * REACH * (1 + 1e-6)
    lowest = grid.lattice.nearest_((numbers.double() - far).float())
    highest = grid.lattice.nearest_((numbers.double() + far).float())
    assert bool(((levels >= lowest) & (levels <= highest)).all())


class Uneven:
    """A lattice that is neither of integers nor of floats: the one of NF4, rounded."""

    levels = torch.tensor(
        [-1.0, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0]
    )
    ends = (-1.0, 1.0)

    def nearest_(self, numbers):
        return numbers.copy_(self.levels[torch.bucketize(numbers, (self.levels[1:] + self.levels[:-1]) / 2)])

    def neighbours(self, numbers):
        above = torch.bucketize(numbers, self.levels, right=True)
        return self.levels[(above - 1).clamp(min=0)], self.levels[above.clamp(max=15)]


def test_any_lattice_will_do():
    base, values, _, basis = case("int4", 128, 256, size=0.02)
    grid = Grid(Uneven(), lambda levels: None, scale=base.view(128, 4, 64).abs().amax(-1) * 0.9, group=64)
    base = grid.values(grid.nearest(base))
    values = base + values - case("int4", 128, 256, size=0.02)[0]
    levels, _ = round_adapter(values, grid, schedule_of(basis, damping_for(8, 256)))
    assert torch.equal(grid.nearest(grid.values(levels)), levels)
    found = in_span(grid.values(levels), values, base, basis)
    assert (
        found.relative_error
        < 0.15 * in_span(grid.values(grid.nearest(values)), values, base, basis).relative_error
    )


def test_values_beyond_the_last_level_saturate_and_others_make_up_for_it():
    _, values, grid, basis = case("int4", size=0.01)
    values[:, 5] += 0.15
    levels, error = round_adapter(values, grid, schedule_of(basis, 0.05))
    assert bool((levels[:, 5] == 7).all())
    alone = torch.outer(grid.values(levels)[:, 5] - values[:, 5], basis[:, 5])
    assert error.norm() < 0.3 * alone.norm()


def test_columns_that_the_adapter_does_not_see_are_rounded_to_nearest():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 192, generator=generator)
    a[:, 50:80] = 0
    a[:, -20:] = 0
    values = torch.randn(64, 192, generator=generator)
    bf16 = Grid(PLAIN["BF16"], lambda levels: None)
    levels, error = round_adapter(values, bf16, schedule_of(row_space([a]), 0.05))
    nearest = bf16.nearest(values)
    unseen = (a == 0).all(0)
    assert torch.equal(levels[:, unseen], nearest[:, unseen])
    assert bool(error.isfinite().all())


@pytest.mark.parametrize("along", [False, True])
def test_levels_may_be_put_where_the_values_are(along):
    _, values, grid, basis = case("bf16", 192, 192)
    levels, error = round_adapter(values, grid, schedule_of(basis, 0.05), along=along)
    found, own = round_adapter(values, grid, schedule_of(basis, 0.05), along=along, out=values)
    assert found is values
    assert torch.equal(values, levels)
    assert torch.equal(own, error)


def test_rows_that_are_on_the_grid_already_stay():
    base, values, grid, basis = case("bf16")
    values[7] = base[7]
    levels, _ = round_adapter(values, grid, schedule_of(basis, 0.05))
    assert torch.equal(levels[7], base[7])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["bf16", "int4", "nvfp4"])
def test_what_is_not_finite_stays_in_its_row(kind, bad):
    _, values, grid, basis = case(kind)
    clean, _ = round_adapter(values, grid, schedule_of(basis, 0.05))
    values[3, 17] = bad
    levels, _ = round_adapter(values, grid, schedule_of(basis, 0.05))
    others = torch.arange(len(values)) != 3
    assert torch.equal(levels[others], clean[others])


@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(1, 1, 1), (3, 5, 2), (17, 1, 1), (5, 700, 1), (2, 40, 40)]
)
def test_small_shapes_work(rows, columns, rank):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, columns, generator=generator)
    basis = row_space([torch.randn(rank, columns, generator=generator)])
    grid = Grid(Integers(-8, 7), lambda levels: None, scale=torch.full((rows, 1), 0.25))
    levels, error = round_adapter(values, grid, schedule_of(basis, 0.05))
    exact = (grid.values(levels).double() - values.double()) @ basis.double().T
    assert (error - exact).abs().max() < 1e-5


def test_memory_that_other_tiles_were_rounded_in_changes_nothing():
    memory = Memory()
    for kind, n_in in (("nvfp4", 256), ("int4", 128), ("bf16", 512), ("nvfp4", 128)):
        _, values, grid, basis = case(kind, 96, n_in, size=0.02)
        schedule = schedule_of(basis, 0.05)
        levels, error = round_adapter(values, grid, schedule)
        out = memory.of("levels", tuple(values.shape), values)
        found, own = round_adapter(values, grid, schedule, out=out, memory=memory)
        assert found.data_ptr() == out.data_ptr()
        assert torch.equal(found, levels)
        assert torch.equal(own, error)

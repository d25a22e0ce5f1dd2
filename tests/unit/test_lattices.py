"""Lattices: the nearest level and the neighbours of a number, against torch's own conversions and a search of all levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_merge.codecs.lattice import E2M1, E2M1_AWAY, E4M3, E5M2, PLAIN, Floats, Integers, Table

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The table of bitsandbytes, whose differences get smaller towards 0."""

TABLES = {
    "nf4": Table(NF4),
    "of one": Table((0.25,)),
    "of two": Table((-3.0, 5.0)),
    "far apart": Table((-(2.0**100), -1.0, 0.0, 2.0**-100, 2.0**-99, 7.0)),
    "beside each other": Table(tuple(np.float32(1) + k * np.finfo(np.float32).eps for k in range(4))),
}
E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FLOAT8 = {"float8_e4m3fn": E4M3, "float8_e5m2": E5M2}


def patterns(dtype):
    """Return every finite number of a dtype, float32."""
    width = getattr(torch, dtype).itemsize
    codes = torch.arange(1 << 8 * width).to({1: torch.uint8, 2: torch.int32}[width])
    stored = codes.view(torch.uint8) if width == 1 else codes.to(torch.int16)
    found = stored.view(getattr(torch, dtype)).float()
    return found[found.isfinite()]


def levels_of(name):
    lattice = LATTICES[name]
    if isinstance(lattice, Integers):
        return np.arange(lattice.first, lattice.last + 1, dtype=np.float64)
    if isinstance(lattice, Table):
        return np.array(lattice.levels)
    if lattice in (E2M1, E2M1_AWAY):
        return np.unique([*E2M1_LEVELS, *(-level for level in E2M1_LEVELS)])
    return np.unique(patterns(name).double().numpy())


LATTICES = {
    **FLOAT8,
    "bfloat16": PLAIN["BF16"],
    "float16": PLAIN["F16"],
    "e2m1": E2M1,
    "e2m1 away": E2M1_AWAY,
    "int4": Integers(-8, 7),
    "uint3": Integers(0, 7),
    "int8": Integers(-127, 127),
    **TABLES,
}
each = pytest.mark.parametrize("name", LATTICES)


def around(levels):
    """Return float32 numbers where the nearest level may go wrong: levels, the middles between them, and what is next to both."""
    with np.errstate(over="ignore"):
        at = np.concatenate([levels, (levels[:-1] + levels[1:]) / 2]).astype(np.float32)
    up, down = (np.nextafter(at, np.float32(end)) for end in (np.inf, -np.inf))
    drawn = np.random.default_rng(0).uniform(-1, 1, 4000) * np.abs(levels).max()
    return np.unique(np.concatenate([at, up, down, drawn.astype(np.float32)]))


@each
def test_no_level_is_nearer_than_the_nearest(name):
    levels = levels_of(name)
    numbers = around(levels)
    numbers = numbers[(numbers >= levels[0]) & (numbers <= levels[-1])]
    found = LATTICES[name].nearest_(torch.from_numpy(numbers.copy())).double().numpy()
    at = np.searchsorted(levels, numbers).clip(1, max(len(levels) - 1, 1))
    nearest = np.minimum(
        np.abs(levels[at - 1] - numbers), np.abs(levels[np.minimum(at, len(levels) - 1)] - numbers)
    )
    assert len(numbers) >= len(levels)
    assert np.isin(found, levels).all()
    assert (np.abs(found - numbers) == nearest).all()


@each
def test_a_level_stays_and_what_is_beyond_the_ends_becomes_an_end(name):
    lattice, levels = LATTICES[name], torch.from_numpy(levels_of(name)).float()
    assert torch.equal(lattice.nearest_(levels.clone()), levels)
    assert lattice.ends == (levels[0].item(), levels[-1].item())
    if name in {"bfloat16", "float16"}:
        # As torch converts them.
        assert lattice.nearest_(torch.tensor([3e38 if name == "float16" else 3.4e38])).isinf().all()
    else:
        beyond = torch.tensor([-3e38, -torch.inf, torch.inf, 3e38])
        first, last = lattice.ends
        assert lattice.nearest_(beyond).tolist() == [first, first, last, last]


@each
def test_neighbours_are_next_to_a_number(name):
    levels = levels_of(name)
    numbers = np.concatenate([around(levels), [-3e38, 3e38]]).astype(np.float32)
    below, above = (one.double().numpy() for one in LATTICES[name].neighbours(torch.from_numpy(numbers)))
    at = np.searchsorted(levels, numbers, side="right")
    last = len(levels) - 1
    assert np.array_equal(below, levels[(at - 1).clip(0)])
    assert np.array_equal(above, levels[at.clip(max=last)])


@pytest.mark.parametrize("name", [*FLOAT8, "bfloat16", "float16"])
def test_floats_are_rounded_as_torch_converts_them(name):
    lattice = LATTICES[name]
    numbers = torch.from_numpy(around(np.unique(patterns(name).double().numpy())))
    numbers = torch.cat([numbers, torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    numbers = numbers[numbers.abs() <= lattice.largest]
    wanted = numbers.to(getattr(torch, name)).float()
    found = lattice.nearest_(numbers.clone())
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))
    if name == "float16":
        # By arithmetic, as smaller dtypes are.
        found = Floats(10, -14, 65504.0).nearest_(numbers.clone())
        assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


def test_ties_of_e2m1_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert E2M1.nearest_(ties.clone()).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert E2M1.nearest_(-ties).tolist() == [-0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0]
    assert E2M1.nearest_(torch.tensor([-0.1])).signbit().all()


def test_ties_of_the_experts_of_gpt_oss_go_away_from_zero():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    away = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert E2M1_AWAY.nearest_(ties.clone()).tolist() == away
    assert E2M1_AWAY.nearest_(-ties).tolist() == [-level for level in away]
    # A sum with one half would carry what is just below a tie over it.
    below = ties.nextafter(torch.zeros(()))
    assert E2M1_AWAY.nearest_(below).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
    assert E2M1_AWAY.nearest_(torch.tensor([-0.1, -0.0])).signbit().all()
    assert E2M1_AWAY.nearest_(torch.tensor([torch.nan])).isnan().all()


def test_ties_of_integers_go_to_the_even_one_and_of_tables_down():
    assert Integers(-8, 7).nearest_(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])).tolist() == [-2, 0, 0, 2, 2]
    assert Table((-2.0, 0.0, 1.0, 3.0)).nearest_(torch.tensor([-1.0, 0.5, 2.0])).tolist() == [-2.0, 0.0, 1.0]


def test_a_table_has_each_of_its_finite_numbers_once_in_order():
    stored = torch.tensor([0.5, -1.0, 0.0, torch.nan, -0.0, 0.5, torch.inf])
    assert Table.of(stored).levels == (-1.0, 0.0, 0.5)
    assert Table.of(torch.tensor([torch.nan])).levels == (0.0,)


@pytest.mark.parametrize("name", TABLES)
def test_places_of_levels_are_those_in_the_order(name):
    table = TABLES[name]
    places = torch.arange(len(table.levels)).repeat(3).flip(0)
    found = table.positions(torch.tensor(table.levels)[places])
    assert torch.equal(found, places.int())


def test_numbers_that_are_none_do_no_harm():
    for name, lattice in LATTICES.items():
        found = lattice.nearest_(torch.tensor([[torch.nan, 1.0]]))
        assert found[0, 1].item() in levels_of(name).astype(np.float32), name


def test_numbers_may_lie_in_memory_in_any_order():
    numbers = torch.randn((5, 7), generator=torch.Generator().manual_seed(0))
    for name, lattice in LATTICES.items():
        wanted = lattice.nearest_(numbers.clone())
        assert torch.equal(lattice.nearest_(numbers.T.contiguous().T), wanted), name
        below, above = lattice.neighbours(numbers.T.contiguous().T)
        assert torch.equal(below, lattice.neighbours(numbers)[0]), name
        assert torch.equal(above, lattice.neighbours(numbers)[1]), name

"""Compiled loops, against torch and against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_merge.codecs import compiled as decoding
from lora_merge.codecs.bits import pack, words_of
from lora_merge.codecs.grid import Codes, Grid
from lora_merge.codecs.lattice import E2M1, E2M1_AWAY, E4M3, E5M2, PLAIN, Integers, Table
from lora_merge.codecs.stored_grid import stored_at_once, stored_grid
from lora_merge.codecs.tables import (
    E2M1_SIGNS,
    keep_signs_of_zeros_,
    look_up,
    look_up_e2m1,
    pack_bytes,
    values_of_codes,
    values_of_e2m1,
)
from lora_merge.native import library as native
from lora_merge.native.library import SWITCH, hidden, library
from lora_merge.rounding.adapter import round_adapter
from lora_merge.rounding.basis import row_space
from lora_merge.rounding.compiled import round_to_codes, round_to_levels
from lora_merge.rounding.feedback import damping_for
from lora_merge.rounding.schedule import schedule_of, without_feedback
from tests.grids import GRIDS, case, in_span

pytestmark = pytest.mark.skipif(library() is None, reason="the compiled loops are not built here")

COMPILED = [kind for kind in GRIDS if kind != "f16"]
"""Kinds of grids that the compiled code knows."""


def both(values, grid, schedule):
    """Return levels and error of the compiled code, then of torch."""
    levels = torch.empty_like(values)
    error = round_to_levels(values, grid, schedule, levels)
    assert error is not None
    with hidden():
        return (levels, error), round_adapter(values, grid, schedule)


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(192, 256, 8), (64, 4096, 16), (64, 1024, 64)])
def test_levels_are_those_of_torch_but_for_ties(kind, rows, columns, rank):
    base, values, grid, basis = case(kind, rows, columns, rank)
    schedule = schedule_of(basis, damping_for(rank, columns))
    (levels, error), (wanted, other) = both(values, grid, schedule)
    # Where sums differ in their last bit, a tie may fall the other way, and the rest of that line follows.
    assert (levels == wanted).float().mean() > 0.99
    assert (levels == wanted).all(1).float().mean() > 0.95
    same = (levels == wanted).all(1)
    torch.testing.assert_close(error[same], other[same], rtol=1e-3, atol=float(other.abs().max()) * 1e-3)
    ours, theirs = (in_span(grid.values(found), values, base, basis) for found in (levels, wanted))
    assert ours.relative_error < theirs.relative_error * 1.05 + 1e-6


@pytest.mark.parametrize("kind", COMPILED)
def test_the_error_is_that_of_the_levels(kind):
    _, values, grid, basis = case(kind)
    levels = torch.empty_like(values)
    error = round_to_levels(values, grid, schedule_of(basis, 0.05), levels)
    exact = (grid.values(levels).double() - values.double()) @ basis.double().t()
    torch.testing.assert_close(error.double(), exact, rtol=1e-3, atol=float(exact.abs().max()) * 2e-3)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    rank=st.integers(1, 20),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 1000),
)
def test_codes_are_the_levels_for_any_shape(rows, columns, rank, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    values, a = (torch.randn(n, columns, generator=generator) for n in (rows, rank))
    half = 1 << (bits - 1)
    grid = Grid(
        Integers(-half, half - 1), lambda levels: None, scale=values.abs().amax(1, keepdim=True) / half
    )
    basis = row_space([a])
    schedule = schedule_of(basis, damping_for(len(basis), columns))
    # A border of another value around the codes shows what is written beyond them.
    words = torch.full((rows, -(-columns * bits // 8) + 3), 77, dtype=torch.uint8)
    out = words[:, :-3].contiguous()
    error = round_to_codes(values, replace(grid, codes=Codes.of(out, bits, offset=half)), schedule)
    levels = torch.full((rows, columns), 9.0)
    assert torch.equal(error, round_to_levels(values, grid, schedule, levels))
    codes = out if bits == 8 else torch.stack((out & 15, out >> 4), -1).view(rows, -1)
    assert torch.equal(codes[:, :columns].float() - half, levels)
    assert (codes[:, columns:] == 0).all()
    with hidden():
        wanted, _ = round_adapter(values, grid, schedule)
    assert (levels == wanted).all(1).float().mean() >= 1 - 2 / rows


@pytest.mark.parametrize("columns", [36, 61])
def test_what_is_left_of_the_last_word_is_zero(columns):
    generator = torch.Generator().manual_seed(0)
    values, a = (torch.randn(n, columns, generator=generator) for n in (5, 3))
    words = torch.full((5, words_of(columns, 4)), -1, dtype=torch.int32)
    grid = Grid(Integers(-8, 7), lambda levels: None, scale=values.abs().amax(1, keepdim=True) / 8)
    schedule, levels = schedule_of(row_space([a]), 0.05), torch.empty_like(values)
    assert round_to_codes(values, replace(grid, codes=Codes.of(words, 4, offset=8)), schedule) is not None
    round_to_levels(values, grid, schedule, levels)
    assert torch.equal(words, pack(levels.add(8).to(torch.uint8), 4))


@pytest.mark.parametrize("lattice", [E4M3, E5M2, E2M1], ids=["e4m3", "e5m2", "e2m1"])
def test_floats_are_stored_as_torch_stores_them(lattice):
    """All magnitudes, subnormal levels and zeros of either sign, too."""
    generator = torch.Generator().manual_seed(1)
    shape = (48, 256)
    exponents = torch.randint(-20, 17, shape, generator=generator).float()
    values = torch.randn(shape, generator=generator) * torch.exp2(exponents)
    values[::5, ::3] = 0.0
    values[1::5, ::3] = -0.0
    schedule = schedule_of(row_space([torch.randn(4, 256, generator=generator)]), 0.05)
    bits = 4 if lattice is E2M1 else 8
    stored = torch.randint(0, 256, (48, 256 * bits // 8), dtype=torch.uint8, generator=generator)
    stored[:, ::2] &= 0x88
    levels, found = torch.empty(shape), torch.empty_like(stored)
    grid = Grid(lattice, lambda levels: None)
    for before in (None, stored):
        round_to_codes(
            values,
            replace(grid, codes=Codes.of(found, bits, stored=before, keeps_signs=before is not None)),
            schedule,
        )
        round_to_levels(values, grid, schedule, levels)
        wanted = torch.empty_like(found)
        if bits == 4:
            decoded = torch.empty(shape)
            look_up_e2m1(found, decoded)
            if before is None:
                assert torch.equal(decoded.view(torch.int32), levels.view(torch.int32))
                plain = found.clone()
                continue
            keep_signs_of_zeros_(plain, stored, E2M1_SIGNS)
            assert torch.equal(found, plain)
        else:
            pack_bytes(levels, "F8_E4M3" if lattice is E4M3 else "F8_E5M2", wanted)
            if before is not None:
                keep_signs_of_zeros_(wanted, stored, 0x80)
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", COMPILED)
def test_without_feedback_each_level_is_the_nearest(kind):
    _, values, grid, basis = case(kind)
    bits = {"bf16": 0, "nvfp4": 4, "fp8": 8, "int8": 8}.get(kind, 4)
    if not bits:
        pytest.skip("codes are of quantised storages")
    out = torch.empty(len(values), values.shape[1] * bits // 8, dtype=torch.uint8)
    first = grid.lattice.ends[0] if isinstance(grid.lattice, Integers) else 0
    codes = Codes.of(out, bits, offset=-int(first))
    schedule = without_feedback(basis)
    error = round_to_codes(values, replace(grid, codes=codes), schedule, is_fed_back=False)
    wanted = grid.nearest(values)
    if kind == "fp8":
        found = torch.empty_like(values)
        look_up(out, "F8_E4M3", found)
    elif kind == "nvfp4":
        found = torch.empty_like(values)
        look_up_e2m1(out, found)
    else:
        whole = out if bits == 8 else torch.stack((out & 15, out >> 4), -1).view(values.shape)
        found = whole.float() + first
    assert torch.equal(found, wanted)
    exact = (grid.values(wanted).double() - values.double()) @ basis.double().t()
    torch.testing.assert_close(error.double(), exact, rtol=1e-3, atol=float(exact.abs().max()) * 1e-4)


@pytest.mark.parametrize("columns", [256, 4096])
def test_without_feedback_every_schedule_of_a_basis_gives_the_same_bits(columns):
    _, values, grid, basis = case("fp8", columns=columns)
    found = []
    for schedule in (schedule_of(basis, 0.05), without_feedback(basis)):
        out = torch.empty(values.shape, dtype=torch.uint8)
        codes = Codes.of(out, 8)
        error = round_to_codes(values, replace(grid, codes=codes), schedule, is_fed_back=False)
        found.append((out, error))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    # The blocks differ, else this would say nothing.
    assert (
        schedule_of(basis, 0.05).feedback.flat.sizes.tolist()
        != without_feedback(basis).feedback.flat.sizes.tolist()
    )


@pytest.mark.parametrize("kind", COMPILED)
def test_lines_do_not_depend_on_each_other(kind):
    _, values, grid, basis = case(kind, rows=130 if kind != "fp8" else 192)
    schedule, levels = schedule_of(basis, 0.05), torch.empty_like(values)
    error = round_to_levels(values, grid, schedule, levels)
    for first, last in ((0, 1), (5, 44), (64, len(values))):
        part = torch.empty(last - first, values.shape[1])
        own = round_to_levels(values[first:last], grid.of_lines(first, last), schedule, part)
        assert torch.equal(part, levels[first:last])
        assert torch.equal(own, error[first:last])


@pytest.mark.parametrize("kind", COMPILED)
def test_all_vectors_give_the_same_bits(kind):
    found = library()
    if found.lanes != 16:
        pytest.skip("this processor has one width of vectors")
    _, values, grid, basis = case(kind)
    schedule, levels, other = schedule_of(basis, 0.05), torch.empty_like(values), torch.empty_like(values)
    error = round_to_levels(values, grid, schedule, levels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_found", lambda: found._replace(lanes=8))
        own = round_to_levels(values, grid, schedule, other)
    assert torch.equal(levels.view(torch.int32), other.view(torch.int32))
    assert torch.equal(error, own)


def test_part_of_a_matrix_in_its_place():
    _, values, grid, basis = case("int4")
    schedule = schedule_of(basis, 0.05)
    wide = torch.full((len(values), 300), 5.0)
    wide[:, 20:276] = values
    levels = torch.empty_like(values)
    error = round_to_levels(values, grid, schedule, levels)
    own = round_to_levels(wide[:, 20:276], grid, schedule, wide[:, 20:276])
    assert torch.equal(wide[:, 20:276], levels)
    assert torch.equal(own, error)
    assert (wide[:, :20] == 5).all()
    assert (wide[:, 276:] == 5).all()


def test_bfloat16_is_written_at_once():
    _, values, grid, basis = case("bf16")
    schedule, levels = schedule_of(basis, 0.05), torch.empty_like(values)
    stored = torch.empty_like(values, dtype=torch.bfloat16)
    values[3, 7] = 3.4e38
    round_to_levels(values, grid, schedule, levels)
    round_to_levels(values, grid, schedule, stored)
    # What is beyond the largest number becomes infinite, and makes the rest of its line NaN.
    assert torch.equal(stored.float().nan_to_num(7.0), levels.nan_to_num(7.0))
    assert not levels[3].isfinite().all()
    assert levels[:3].isfinite().all()


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows(kind, what):
    _, values, grid, basis = case(kind)
    values[5, 9] = what
    schedule, levels = schedule_of(basis, 0.05), torch.empty_like(values)
    error = round_to_levels(values, grid, schedule, levels)
    assert not error[5].isfinite().all()
    assert error[:5].isfinite().all()
    assert error[6:].isfinite().all()


@pytest.mark.parametrize(
    "lattice",
    [PLAIN["F16"], PLAIN["F32"], E2M1_AWAY, Table((-1.0, 0.0, 0.7))],
    ids=lambda one: type(one).__name__,
)
def test_other_lattices_are_left_to_torch(lattice):
    _, values, _, basis = case("bf16")
    levels = torch.full_like(values, 3.0)
    grid = Grid(lattice, lambda levels: None)
    assert round_to_levels(values, grid, schedule_of(basis, 0.05), levels) is None
    assert (levels == 3).all()


def test_a_quotient_of_a_library_is_left_to_torch():
    _, values, grid, basis = case("int4")
    out = torch.zeros(len(values), values.shape[1] // 2, dtype=torch.uint8)
    grid = replace(grid, codes=Codes.of(out, 4, offset=8), quotient=lambda found: found.clone())
    assert round_to_codes(values, grid, schedule_of(basis, 0.05), is_fed_back=False) is None
    assert (out == 0).all()


@pytest.mark.parametrize("width", [1, 15, 16, 128, 130, 447])
@pytest.mark.parametrize("group", [0, 16, 32, 128])
@pytest.mark.parametrize("coding", ["e4m3", "e5m2", "int8", "int4", "int4-zeros", "e2m1"])
def test_decoding_gives_the_bits_of_torch(coding, group, width):
    generator = torch.Generator().manual_seed(width + group)
    rows, bits = 37, 4 if ("4" in coding and coding[0] == "i") or coding == "e2m1" else 8
    codes = torch.randint(0, 256, (rows, -(-width * bits // 8)), dtype=torch.uint8, generator=generator)
    n_groups = -(-width // (group or width))
    scale, zero = torch.rand(rows, n_groups, generator=generator), None
    if coding == "int4-zeros":
        zero = torch.randint(0, 16, (rows, n_groups), generator=generator).float()
    table = {
        "e4m3": lambda: values_of_codes("F8_E4M3", torch.device("cpu")),
        "e5m2": lambda: values_of_codes("F8_E5M2", torch.device("cpu")),
        "int8": decoding.signed_bytes,
        "int4": lambda: decoding.whole_numbers(4, 8),
        "int4-zeros": lambda: decoding.whole_numbers(4, 0),
        "e2m1": values_of_e2m1,
    }[coding]()
    numbers = codes if bits == 8 else torch.stack((codes & 15, codes >> 4), -1).view(rows, -1)
    column = torch.arange(width) // (group or width)
    wanted = table[numbers[:, :width].long()]
    if zero is not None:
        wanted = wanted - zero[:, column]
    wanted = wanted * scale[:, column]
    for vectors in {library().lanes, 8 if library().lanes == 16 else library().lanes}:
        out = torch.empty(rows, width)
        with pytest.MonkeyPatch.context() as patch:
            found = library()._replace(lanes=vectors)
            patch.setattr(native, "_found", lambda found=found: found)
            is_e4m3 = coding == "e4m3"
            assert decoding.decode(codes, table, scale, out, group=group, zero=zero, is_e4m3=is_e4m3)
        # NaN has several bits; all of them mean the same.
        assert torch.equal(out.nan_to_num(7.0).view(torch.int32), wanted.nan_to_num(7.0).view(torch.int32))
        assert torch.equal(out.isnan(), wanted.isnan())


def test_codes_that_are_too_short_are_left_to_torch():
    out, scale = torch.full((2, 64), 3.0), torch.ones(2, 1)
    table = decoding.whole_numbers(4, 8)
    assert not decoding.decode(torch.zeros(2, 31, dtype=torch.uint8), table, scale, out, group=0)
    assert not decoding.decode(torch.zeros(3, 32, dtype=torch.uint8), table, scale, out, group=0)
    assert (out == 3).all()


def test_codes_of_other_bits_are_left_to_torch():
    out, codes = torch.full((2, 64), 3.0), torch.zeros(2, 64, dtype=torch.uint8)
    assert not decoding.decode(codes, decoding.whole_numbers(2, 2), torch.ones(2, 1), out, group=0)
    assert (out == 3).all()


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 64, 33)])
def test_codes_without_a_scale_mean_what_torch_says(dtype, shape):
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found, wanted = torch.empty(shape), torch.empty(shape)
    look_up(codes, dtype, found)
    with hidden():
        look_up(codes, dtype, wanted)
    assert torch.equal(found.nan_to_num(7.0).view(torch.int32), wanted.nan_to_num(7.0).view(torch.int32))
    assert torch.equal(found.isnan(), wanted.isnan())


def test_the_switch_leaves_it_out():
    code = "from lora_merge.native.library import library; print(library())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, SWITCH: "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "None\n"


def test_a_library_of_other_sources_is_left_alone(monkeypatch):
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    assert native._found.__wrapped__() is None


def test_a_grid_of_zero_scales_keeps_its_codes():
    """Where a scale is 0 codes mean nothing, and `keep` leaves them: so they are not stored at once."""
    out = torch.zeros(4, 32, dtype=torch.uint8)
    some = torch.ones(4, 2)

    def make(scale):
        grid = stored_grid(E4M3, lambda levels: None, lambda: torch.zeros(4, 32), scale, group=16)
        return stored_at_once(grid, scale, Codes.of(out, 8))

    assert make(some).codes is not None
    some[1, 1] = 0
    assert make(some).codes is None

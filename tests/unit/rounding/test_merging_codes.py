"""Codes that are merged from codes at once, against values that are decoded, changed and rounded one after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_merge.codecs.compiled import decode, signed_bytes, whole_numbers
from lora_merge.codecs.grid import Codes, Grid
from lora_merge.codecs.lattice import E2M1, E4M3, E5M2, Integers
from lora_merge.codecs.tables import values_of_codes, values_of_e2m1
from lora_merge.native import library as native
from lora_merge.native.library import library
from lora_merge.rounding.basis import row_space
from lora_merge.rounding.compiled import merge_codes, round_to_codes
from lora_merge.rounding.feedback import damping_for
from lora_merge.rounding.schedule import schedule_of, without_feedback

pytestmark = pytest.mark.skipif(library() is None, reason="the compiled loops are not built here")

CPU = torch.device("cpu")
LATTICES = {
    "e4m3": (E4M3, 8, lambda: values_of_codes("F8_E4M3", CPU)),
    "e5m2": (E5M2, 8, lambda: values_of_codes("F8_E5M2", CPU)),
    "int8": (Integers(-128, 127), 8, signed_bytes),
    "int4": (Integers(-8, 7), 4, lambda: whole_numbers(4, 8)),
    "int4-zeros": (Integers(0, 15), 4, lambda: whole_numbers(4, 0)),
    "e2m1": (E2M1, 4, values_of_e2m1),
}


def drawn(coding, rows, columns, group=0, seed=0):
    """Return stored codes, and the grid that they are on; its codes go into another place."""
    generator = torch.Generator().manual_seed(seed)
    lattice, bits, table = LATTICES[coding]
    stored = torch.randint(0, 256, (rows, -(-columns * bits // 8)), dtype=torch.uint8, generator=generator)
    if coding == "e4m3":  # but for NaN
        stored[(stored & 0x7F) == 0x7F] = 0
    if coding == "e5m2":
        stored &= 0xBF
    n_groups = -(-columns // (group or columns))
    # Of all powers of two, some of which make the values subnormal.
    scale = torch.rand(rows, n_groups, generator=generator) * torch.exp2(
        torch.randint(-20, 3, (rows, n_groups), generator=generator).float()
    )
    zero = None
    if coding == "int4-zeros":
        zero = torch.randint(0, 16, (rows, n_groups), generator=generator).float()
    offset = 8 if coding == "int4" else 0
    keeps_signs = coding[0] == "e"
    codes = Codes.of(
        torch.full_like(stored, 0x55),
        bits,
        offset=offset,
        stored=stored,
        keeps_signs=keeps_signs,
        levels=table(),
    )
    return Grid(lattice, lambda levels: None, scale, zero, group=group, codes=codes)


def factors(rows, columns, rank, seed=1):
    """Return factors whose product has no rounding, whatever the order of its sum."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randint(-8, 9, shape, generator=generator) / 8 for shape in ((rows, rank), (rank, columns))
    )
    return left, right


def values_of(grid, left, right, factor):
    codes = grid.codes
    out = torch.empty(len(left), right.shape[1])
    is_e4m3 = grid.lattice == E4M3
    assert decode(
        codes.stored, codes.levels, grid.scale, out, group=grid.group, zero=grid.zero, is_e4m3=is_e4m3
    )
    return out.add_((left @ right).mul_(factor))


def both(grid, schedule, left, right, factor, *, is_fed_back):
    """Return codes and error, made at once; and the same, made one step after the other."""
    error = merge_codes(grid, schedule, left, right, factor, is_fed_back=is_fed_back)
    found = grid.codes.out.clone()
    grid.codes.out.fill_(0x55)
    values = values_of(grid, left, right, factor)
    wanted = round_to_codes(values, grid, schedule, is_fed_back=is_fed_back)
    assert error is not None
    assert wanted is not None
    return (found, error), (grid.codes.out, wanted)


@pytest.mark.parametrize("is_fed_back", [False, True])
@pytest.mark.parametrize(("columns", "group"), [(64, 0), (256, 32), (448, 128), (334, 16), (20, 0)])
@pytest.mark.parametrize("coding", LATTICES)
def test_the_codes_are_those_of_one_step_after_the_other(coding, columns, group, is_fed_back):
    rows, rank = 37, 6
    grid, (left, right) = drawn(coding, rows, columns, group), factors(rows, columns, rank)
    basis = row_space([right])
    schedule = schedule_of(basis, damping_for(rank, columns)) if is_fed_back else without_feedback(basis)
    for vectors in {library().lanes, min(library().lanes, 8)}:
        with pytest.MonkeyPatch.context() as patch:
            found = library()._replace(lanes=vectors)
            patch.setattr(native, "_found", lambda found=found: found)
            # A power of two, and a factor that is rounded before the sum is.
            for factor in (0.0625, 0.37):
                (codes, error), (wanted, other) = both(
                    grid, schedule, left, right, factor, is_fed_back=is_fed_back
                )
                assert torch.equal(codes, wanted)
                assert torch.equal(error, other)


@pytest.mark.parametrize("rank", [2, 5, 16, 128])
def test_any_rank_and_any_number_of_lines(rank):
    for rows in (1, 15, 16, 33, 64):
        grid, (left, right) = drawn("e4m3", rows, 512, 128), factors(rows, 512, rank)
        schedule = without_feedback(row_space([right]))
        (codes, error), (wanted, other) = both(grid, schedule, left, right, 0.03, is_fed_back=False)
        assert torch.equal(codes, wanted)
        assert torch.equal(error, other)
        # The change is large enough to be seen.
        assert (codes != grid.codes.stored).float().mean() > 0.1


def test_lines_may_share_their_scales_and_the_factor_its_memory():
    grid, (left, right) = drawn("e4m3", 40, 256, 64), factors(60, 300, 4)
    left, right = left[10:50], right[:, :256]
    grid = replace(grid, scale=grid.scale[:1].expand(40, -1))
    schedule = without_feedback(row_space([right]))
    found = merge_codes(grid, schedule, left, right, 0.5, is_fed_back=False)
    codes = grid.codes.out.clone()
    values = values_of(replace(grid, scale=grid.scale.contiguous()), left, right, 0.5)
    wanted = round_to_codes(values, grid, schedule, is_fed_back=False)
    assert torch.equal(codes, grid.codes.out)
    assert torch.equal(found, wanted)


def test_random_factors_give_the_codes_of_torch_but_for_ties():
    rows, columns, rank = 128, 1024, 16
    grid = drawn("e4m3", rows, columns, 128)
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randn(shape, generator=generator) for shape in ((rows, rank), (rank, columns)))
    schedule = without_feedback(row_space([right]))
    (codes, _), (wanted, _) = both(grid, schedule, left, right, 0.01, is_fed_back=False)
    # Sums of a matrix library may differ in their last bit.
    assert (codes != wanted).sum() <= 4


@pytest.mark.parametrize("what", ["code", "scale", "left", "right"])
def test_what_is_not_finite_shows(what):
    grid, (left, right) = drawn("e4m3", 40, 256, 64), factors(40, 256, 4)
    if what == "code":
        grid.codes.stored[5, 9] = 0x7F
    elif what == "scale":
        grid.scale[5, 0] = torch.nan
    elif what == "left":
        left[5, 2] = torch.inf
    else:
        right[2, 9] = torch.nan
    schedule = without_feedback(row_space([torch.randn(4, 256)]))
    error = merge_codes(grid, schedule, left, right, 0.5, is_fed_back=False)
    assert not error[5].isfinite().all()
    assert what == "right" or error[:5].isfinite().all()


def test_what_is_left_of_the_last_word_is_zero():
    grid, (left, right) = drawn("int4", 9, 36), factors(9, 36, 3)
    wide = [torch.full((9, 20), fill, dtype=torch.uint8) for fill in (0x11, 0x55)]
    wide[0][:, :18] = grid.codes.stored
    codes = Codes.of(wide[1], 4, offset=8, stored=wide[0], levels=whole_numbers(4, 8))
    schedule = without_feedback(row_space([right]))
    assert merge_codes(replace(grid, codes=codes), schedule, left, right, 0.5, is_fed_back=False) is not None
    assert merge_codes(grid, schedule, left, right, 0.5, is_fed_back=False) is not None
    assert torch.equal(wide[1][:, :18], grid.codes.out)
    assert (wide[1][:, 18:] == 0).all()


@pytest.mark.parametrize(
    "what", ["levels", "stored", "bias", "index", "odd groups", "turned factor", "other lines"]
)
def test_the_rest_is_left_to_others(what):
    grid, (left, right) = drawn("int4", 16, 60, 20), factors(16, 60, 4)
    schedule = without_feedback(row_space([right]))
    changed = {
        "levels": lambda: replace(grid, codes=replace(grid.codes, levels=None)),
        "stored": lambda: replace(grid, codes=replace(grid.codes, stored=None)),
        "bias": lambda: replace(grid, bias=torch.zeros_like(grid.scale)),
        "index": lambda: replace(grid, group=torch.zeros(60, dtype=torch.int32)),
        "odd groups": lambda: replace(grid, group=15),
        "turned factor": lambda: grid,
        "other lines": lambda: grid,
    }[what]()
    if what == "turned factor":
        left = left.t().contiguous().t()
    elif what == "other lines":  # a convolution's rows have several lines each
        left = left[:8]
    assert merge_codes(changed, schedule, left, right, 0.5, is_fed_back=False) is None
    assert (grid.codes.out == 0x55).all()

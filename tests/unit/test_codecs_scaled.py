"""FP8 and int8 with scales, against the formats' definitions, value by value."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from lora_merge.codecs import CODECS
from lora_merge.codecs.tables import values_of_codes
from lora_merge.core.weight import Tile
from tests.decoding import decoded, is_same_in_tiles, same, storage_of

CPU = torch.device("cpu")
SCALES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
POWERS = ("F8_E8M0", "U8")
CODES = ("F8_E4M3", "F8_E5M2", "I8")


def small_float(code, exponent_bits):
    """Return what a byte means by the definition of E4M3 (without infinities, OCP 8-bit floating point) or E5M2."""
    mantissa_bits = 7 - exponent_bits
    sign, exponent = (-1.0 if code & 128 else 1.0), (code & 127) >> mantissa_bits
    mantissa, bias = code & ((1 << mantissa_bits) - 1), (1 << (exponent_bits - 1)) - 1
    if exponent_bits == 4 and code & 127 == 127:
        return math.nan
    if exponent_bits == 5 and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


MEANING = {
    "F8_E4M3": [small_float(code, 4) for code in range(256)],
    "F8_E5M2": [small_float(code, 5) for code in range(256)],
    "I8": [code - 256 if code > 127 else code for code in range(256)],
    "F8_E8M0": [*(2.0 ** (code - 127) for code in range(255)), math.nan],
}


def grid_of(shape, block_rows, block_columns):
    """Return the shape of the scales: one for each block of each matrix."""
    *stack, rows, columns = shape
    return (*stack, -(-rows // (block_rows or rows)), -(-columns // (block_columns or columns)))


def drawn(shape, codes, scale, block_rows, block_columns, seed=0):
    """Return codes of all kinds, and scales."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    grid = grid_of(shape, block_rows, block_columns)
    if scale in SCALES:
        scales = (torch.randn(grid, generator=random) * 0.02).to(SCALES[scale])
    else:
        scales = torch.randint(100, 140, grid, generator=random, dtype=torch.uint8)
    return storage_of(
        "scaled", codes, codes=codes, scale=scale, block_rows=block_rows, block_columns=block_columns
    ), {"weight": weight, "scale": scales}


def expected(shape, storage, stored):
    """Return the product of what each code means and the scale of its block, one rounding."""
    of = dict(storage.settings)
    means = np.array(MEANING[of["codes"]], dtype=np.float32)[stored["weight"].numpy()]
    scale = stored["scale"]
    if of["scale"] in POWERS:
        scales = np.array(MEANING["F8_E8M0"], dtype=np.float32)[scale.view(torch.uint8).numpy()]
    else:
        scales = scale.float().numpy()
    *stack, rows, columns = shape
    scales = scales.reshape(*stack, *grid_of((rows, columns), of["block_rows"], of["block_columns"]))
    i = np.arange(rows) // (of["block_rows"] or rows)
    j = np.arange(columns) // (of["block_columns"] or columns)
    with np.errstate(all="ignore"):
        return torch.from_numpy(means * scales[..., i[:, None], j[None, :]])


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_a_table_has_what_each_code_means(dtype):
    assert same(values_of_codes(dtype, CPU), torch.tensor(MEANING[dtype]))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_a_table_has_what_torch_casts(dtype):
    torch_type = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}[dtype]
    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, torch_type))
    assert same(values_of_codes(dtype, CPU), codes.float())


SHAPES = [(576, 448), (192, 256), (1, 1), (128, 128), (130, 7), (3, 192, 200), (5, 30, 16)]
BLOCKS = [(128, 128), (0, 0), (1, 0), (0, 1), (1, 32), (1, 1), (64, 48), (1000, 1000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_each_value_is_its_code_times_the_scale_of_its_block(shape, blocks):
    storage, stored = drawn(shape, "F8_E4M3", "F32", *blocks)
    assert same(decoded(shape, storage, stored), expected(shape, storage, stored))
    assert is_same_in_tiles(shape, storage, stored)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("scale", [*SCALES, *POWERS])
@pytest.mark.parametrize("blocks", [(128, 128), (0, 0), (1, 0), (1, 32)], ids=str)
def test_codes_and_scales_of_every_dtype_are_decoded(codes, scale, blocks):
    for shape in ((200, 144), (2, 140, 96)):
        storage, stored = drawn(shape, codes, scale, *blocks)
        assert same(decoded(shape, storage, stored), expected(shape, storage, stored))
        assert is_same_in_tiles(shape, storage, stored)


def test_blocks_that_divide_the_grid_are_not_stretched():
    """192 rows are one block and a half. A quotient of shapes, 192 / 2, would give 96."""
    storage, stored = drawn((192, 256), "F8_E4M3", "F32", 128, 128)
    stored["weight"].fill_(0x38)  # 1.0
    values = decoded((192, 256), storage, stored)
    assert (values[:128, :128] == stored["scale"][0, 0]).all()
    assert (values[128:, 128:] == stored["scale"][1, 1]).all()


def test_a_tile_may_begin_and_end_anywhere():
    shape = (3, 200, 144)
    storage, stored = drawn(shape, "F8_E4M3", "BF16", 128, 64)
    lines = expected(shape, storage, stored).view(600, 144)
    ends = (0, 1, 127, 128, 129, 199, 200, 201, 300, 399, 400, 530, 600)
    for start, end in itertools.combinations(ends, 2):
        assert same(decoded(shape, storage, stored, Tile(shape, 600, start, end)), lines[start:end])


def test_a_tile_reads_only_the_scales_of_its_blocks():
    storage, _ = drawn((576, 448), "F8_E4M3", "F32", 128, 128)
    found = CODECS["scaled"].ranges(Tile((576, 448), 576, 300, 520), storage)
    assert found["scale"].shape == (3, 4)
    assert found["scale"].ranges == ((2 * 4 * 4, 3 * 4 * 4),)
    assert found["weight"].ranges == ((300 * 448, 220 * 448),)


@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1)], ids=str)
def test_the_scale_of_a_whole_tensor_has_any_shape_of_one_value(scale_shape):
    storage, stored = drawn((9, 12), "F8_E4M3", "F32", 0, 0)
    wanted = expected((9, 12), storage, stored)
    stored["scale"] = stored["scale"].view(scale_shape)
    assert same(decoded((9, 12), storage, stored), wanted)
    ranges = [CODECS["scaled"].ranges(Tile((9, 12), 9, k, k + 1), storage)["scale"] for k in range(9)]
    assert len(set(ranges)) == 1


@pytest.mark.parametrize(
    ("shape", "blocks", "scale_shape"),
    [
        ((256, 256), (128, 128), (2, 1, 2, 1)),
        ((40, 8), (1, 0), (40,)),
        ((3, 40, 8), (1, 0), (3, 40, 1)),
        ((3, 40, 8), (0, 0), (3,)),
        ((3, 40, 8), (0, 1), (3, 1, 8)),
    ],
    ids=str,
)
def test_axes_of_size_one_say_nothing(shape, blocks, scale_shape):
    storage, stored = drawn(shape, "F8_E4M3", "F32", *blocks)
    wanted = expected(shape, storage, stored)
    stored["scale"] = stored["scale"].view(scale_shape)
    assert same(decoded(shape, storage, stored), wanted)
    assert is_same_in_tiles(shape, storage, stored)


def test_codes_may_be_stored_as_words():
    storage, stored = drawn((24, 64), "F8_E4M3", "U8", 1, 32)
    wanted = expected((24, 64), storage, stored)
    stored["weight"] = stored["weight"].view(torch.int32)
    assert same(decoded((24, 64), storage, stored), wanted)


@pytest.mark.parametrize("scale", [*SCALES, *POWERS])
def test_a_scale_that_is_nan_makes_its_block_nan_and_no_other(scale):
    storage, stored = drawn((64, 64), "I8", scale, 32, 32)
    if scale in SCALES:
        stored["scale"][1, 0] = math.nan
    else:
        stored["scale"][1, 0] = 255
    values = decoded((64, 64), storage, stored)
    assert values[32:, :32].isnan().all()
    assert int(values.isnan().sum()) == 32 * 32


def test_codes_that_are_nan_stay_nan():
    storage, stored = drawn((16, 16), "F8_E4M3", "F32", 0, 0)
    stored["weight"] = torch.arange(256, dtype=torch.uint8).view(16, 16)
    values = decoded((16, 16), storage, stored).flatten()
    assert values.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]


def test_minus_zero_keeps_its_sign():
    storage, stored = drawn((2, 2), "F8_E4M3", "F32", 1, 0)
    stored["weight"] = torch.tensor([[0x00, 0x80], [0x00, 0x80]], dtype=torch.uint8)
    stored["scale"] = torch.tensor([[0.5], [-0.5]])
    values = decoded((2, 2), storage, stored)
    assert torch.signbit(values).tolist() == [[False, True], [True, False]]


def test_the_smallest_power_of_two_is_kept():
    storage, stored = drawn((1, 1), "F8_E4M3", "U8", 1, 32)
    stored["weight"].fill_(0x38)
    stored["scale"].fill_(0)
    assert decoded((1, 1), storage, stored).item() == 2.0**-127

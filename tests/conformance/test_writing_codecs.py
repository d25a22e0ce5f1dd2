"""What every codec keeps that writes onto stored scales, for each member of `ENCODERS` but plain tensors."""

from __future__ import annotations

import pytest
import torch

from lora_merge.codecs import CODECS, ENCODERS
from lora_merge.codecs.geometry import lines_of
from lora_merge.codecs.lattice import Integers, Table
from lora_merge.core.weight import DENSE, WEIGHT, Tile
from lora_merge.formats.safetensors import load
from tests.conformance.test_reading_codecs import SAMPLES, named
from tests.decoding import decoded, parts_of, raw, same, tiles_of, views_of
from tests.encoding import encoded, grid_of, out_of
from tests.storages.reference import FIXTURES, NAMES, quantised_of

SIZES = (1 << 10, 1 << 19)
CASES = [
    pytest.param(sample, shape, id=named(sample, shape))
    for name, samples in SAMPLES.items()
    if name != DENSE
    for sample in samples
    for shape in sample.shapes
]
each = pytest.mark.parametrize(("sample", "shape"), CASES)


def drawn_as(sample, shape):
    """Return the parts of a weight with codes that an encoder could have made."""
    stored = sample.stored(shape)
    if sample.storage.codec == "llm_int8":
        stored[WEIGHT].clamp_(min=-127)
    return stored


def stored_as(sample, shape):
    """Return the parts of a weight, as an encoder could have made them."""
    stored = drawn_as(sample, shape)
    # What is left of the last word of a line is random there.
    values = decoded(shape, sample.storage, stored)
    return stored | {WEIGHT: again(values, stored, sample.storage)}


def again(values, stored, storage, tiles=None):
    """Return the main part of a weight that is encoded anew."""
    shape = tuple(values.shape)
    made = encoded(values, stored, storage, tiles or [Tile(shape, shape[0], 0, shape[0])])
    return torch.frombuffer(bytearray(made), dtype=stored[WEIGHT].dtype).view(stored[WEIGHT].shape)


def whole(shape):
    return Tile(shape, shape[0], 0, shape[0])


def spread(values, seed=0, share=0.3):
    """Return values that are all somewhat different, some beyond what is stored."""
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
    return values + noise * values.abs().mean() * share


def levels_of(lattice):
    """Return every level, float64, in order."""
    if isinstance(lattice, Integers):
        return torch.arange(lattice.first, lattice.last + 1, dtype=torch.float64)
    if isinstance(lattice, Table):
        return torch.tensor(lattice.levels, dtype=torch.float64)
    # Codes of up to eight bits: every number of three bits of mantissa is among those of float16.
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    every = every[every.abs() <= lattice.largest]
    spacing = every.abs().log2().floor().clamp(min=lattice.smallest).exp2() * 2.0**-lattice.mantissa_bits
    return every[every / spacing == (every / spacing).round()].double().unique()


@pytest.mark.parametrize("name", NAMES)
def test_what_a_library_stored_is_encoded_as_it_was(name):
    for path, weight in quantised_of(FIXTURES / name).items():
        shape, storage = weight.shape, weight.storage
        stored = {role: load(ref) for role, ref in weight.parts.items()}
        values = decoded(shape, storage, stored)
        for view in views_of(shape):
            for size in SIZES:
                tiles = tiles_of(shape, storage, view, size)
                assert encoded(values, stored, storage, tiles) == raw(stored[WEIGHT]), (path, len(tiles))


@each
def test_what_was_decoded_is_encoded_as_it_was(sample, shape):
    stored, given = stored_as(sample, shape), drawn_as(sample, shape)
    values = decoded(shape, sample.storage, stored)
    assert same(values, decoded(shape, sample.storage, given))
    for view in views_of(shape):
        for size in SIZES:
            tiles = tiles_of(shape, sample.storage, view, size)
            assert encoded(values, stored, sample.storage, tiles) == raw(stored[WEIGHT]), len(tiles)


# Blocks of bitsandbytes may go on from one matrix of a stack to the next, which are tiles of their own.
@pytest.mark.parametrize(
    ("sample", "shape"),
    [case for case in CASES if not (case.values[0].storage.codec == "bnb4" and len(case.values[1]) == 3)],
)
def test_tiles_of_any_size_and_view_store_the_same_bytes(sample, shape):
    stored = stored_as(sample, shape)
    values = spread(decoded(shape, sample.storage, stored))
    wanted = encoded(values, stored, sample.storage, [whole(shape)])
    assert wanted != raw(stored[WEIGHT])
    for view in views_of(shape):
        for size in SIZES:
            tiles = tiles_of(shape, sample.storage, view, size)
            assert encoded(values, stored, sample.storage, tiles) == wanted, len(tiles)


@each
def test_the_nearest_of_all_levels_is_stored(sample, shape):
    stored = stored_as(sample, shape)
    values = spread(decoded(shape, sample.storage, stored), share=0.8)
    made = stored | {WEIGHT: again(values, stored, sample.storage)}
    # A few rows are enough.
    tile = tiles_of(shape, sample.storage, views_of(shape)[-1], 1 << 11)[-1]
    rows, lines = values.reshape(tile.n_rows, -1)[tile.start : tile.end], lines_of(tile)
    grid = grid_of(tile, rows, stored, sample.storage)
    back = decoded(shape, sample.storage, made, tile)
    values, back = (one.reshape(lines.n, lines.width).double() for one in (rows, back))
    nearest = torch.full_like(values, torch.inf)
    for level in levels_of(grid.lattice).tolist():
        meant = grid.values(torch.full(values.shape, level, dtype=torch.float32)).double()
        nearest = nearest.minimum((meant - values).abs())
    # The arithmetic is that of float32, and a product may be rounded twice.
    slack = 2.0**-21 * (values.abs() + back.abs() + (0 if grid.bias is None else float(grid.bias.max())))
    assert ((back - values).abs() <= nearest + slack).all()


@each
def test_errors_are_within_the_bound(sample, shape):
    stored, tile = stored_as(sample, shape), whole(shape)
    codec = ENCODERS[sample.storage.codec]
    inside = decoded(shape, sample.storage, stored)
    values = spread(inside)
    rows = values.reshape(tile.n_rows, -1)
    made = stored | {WEIGHT: again(values, stored, sample.storage)}
    parts = parts_of(tile, made, sample.storage)
    bound = codec.bound(tile, rows, parts, sample.storage)
    back = decoded(shape, sample.storage, made).view(rows.shape)
    assert ((back - rows).abs() <= bound).all()
    assert codec.bound(tile, inside.view(rows.shape), parts, sample.storage).isfinite().all()
    assert (bound > 0).any()
    beyond = torch.full_like(rows, 1e30)
    assert codec.bound(tile, beyond, parts, sample.storage).isinf().all()


@each
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_beyond_the_last_level_becomes_the_last(sample, shape, sign):
    stored, tile = stored_as(sample, shape), whole(shape)
    values = torch.full(shape, sign * 1e30)
    grid, lines = grid_of(tile, values.reshape(tile.n_rows, -1), stored, sample.storage), lines_of(tile)
    back = decoded(shape, sample.storage, stored | {WEIGHT: again(values, stored, sample.storage)})
    last = grid.values(torch.full((lines.n, lines.width), grid.lattice.ends[sign > 0]))
    assert grid.scale.min() > 0
    assert torch.allclose(back.view(last.shape), last, rtol=2.0**-22, atol=0)


def with_some(part, value):
    """Return a part in which every third number is replaced."""
    bytes_of_float8 = {0.0: 0, torch.nan: 0x7F}
    found = part.clone()
    if part.dtype == torch.uint8:
        found.view(-1)[::3] = bytes_of_float8[value]
    else:
        found.view(-1)[::3] = value
    return found


def scaled_by(sample):
    """Return the role of the scales of a storage that can be 0; None where they are powers of two, or made of others."""
    settings = dict(sample.storage.settings)
    if sample.storage.codec == "bnb4":
        return None if settings["nested"] else "absmax"
    is_exponent = (
        settings.get("scale") in {"E8M0", "U8", "F8_E8M0"} or sample.storage.codec == "mxfp4_experts"
    )
    return None if is_exponent else "pre_quant_scale" if settings.get("pre") else "scale"


@each
def test_where_a_scale_is_zero_codes_stay(sample, shape):
    role = scaled_by(sample)
    if role is None:
        pytest.skip("its scales are never 0")
    stored = stored_as(sample, shape)
    without = stored | {role: with_some(stored[role], 0.0)}
    # NaN shows where these scales count.
    kept = decoded(shape, sample.storage, stored | {role: with_some(stored[role], torch.nan)}).isnan()
    values = spread(decoded(shape, sample.storage, stored), share=3.0)
    made = {WEIGHT: again(values, without, sample.storage)}
    before, after = (decoded(shape, sample.storage, stored | one) for one in ({}, made))
    assert kept.any()
    assert torch.equal(before[kept], after[kept])
    if not kept.all():
        assert (before != after)[~kept].float().mean() > 0.1


def test_every_codec_but_that_of_plain_tensors_was_tried():
    assert {sample.storage.codec for sample, _ in (case.values for case in CASES)} == ENCODERS.keys() - {
        DENSE
    }
    assert ENCODERS.keys() == CODECS.keys()


# what new scales need

WRITTEN = (
    "ct-fp8-block",
    "ct-fp8-channel",
    "ct-int8",
    "ct-int4",
    "ct-int4-asymmetric",
    "ct-int3-asymmetric",
    "ct-int8-packed",
    "ct-mxfp4",
    "ct-mxfp8",
    "ct-nvfp4",
    "fp8-block",
    "fp8-ragged",
)


@pytest.mark.parametrize("name", WRITTEN)
def test_new_parts_have_the_shapes_of_those_that_libraries_write(name):
    for path, weight in quantised_of(FIXTURES / name).items():
        parts = ENCODERS[weight.storage.codec].parts(weight.shape, weight.storage)
        assert next(iter(parts)) == WEIGHT
        assert parts.pop("weight_shape", ("I64", (2,))) == ("I64", (2,))
        needed = {role: weight.parts[role] for role in parts}
        assert {role: (ref.dtype, ref.shape) for role, ref in needed.items()} == parts, path
        ranges = CODECS[weight.storage.codec].ranges(whole(weight.shape), weight.storage)
        assert ranges.keys() == parts.keys()
        assert [one.nbytes for one in ranges.values()] == [needed[role].nbytes for role in ranges]


def test_the_largest_magnitude_of_all_values_is_found_tile_by_tile():
    (sample,) = (one for one in SAMPLES["fp4"] if dict(one.storage.settings)["global"] == "divide")
    codec, values = ENCODERS["fp4"], torch.randn((6, 32), generator=torch.Generator().manual_seed(0))
    values[4, 7] = -9.5
    found = None
    for rows in values.split(2):
        found = codec.look(rows, found, sample.storage)
    assert codec.survey(sample.storage) == "tensor"
    assert found.item() == 9.5
    others = [one for name, samples in SAMPLES.items() for one in samples if name != "fp4"]
    assert {ENCODERS[one.storage.codec].survey(one.storage) for one in others} == {"none"}


# codes that mean the same


def test_a_zero_of_bitsandbytes_fp4_keeps_its_code():
    (sample, *_) = SAMPLES["bnb4"]
    shape = (16, 64)
    stored = sample.stored(shape)
    stored["table"] = torch.tensor([0, 0.0052, 0.667, 1, 0.333, 0.5, 0.167, 0.25])
    stored["table"] = torch.cat([stored["table"], -stored["table"]])
    values = decoded(shape, sample.storage, stored)
    codes = torch.stack((stored[WEIGHT].view(-1) >> 4, stored[WEIGHT].view(-1) & 15), 1).view(shape)
    assert {0, 8} <= set(codes.view(-1).tolist())
    assert encoded(values, stored, sample.storage, [whole(shape)]) == raw(stored[WEIGHT])
    # What becomes 0, and was not, gets the first of the two.
    made = again(torch.zeros(shape), stored, sample.storage)
    found = torch.stack((made.view(-1) >> 4, made.view(-1) & 15), 1).view(shape)
    assert torch.equal(found, torch.where(codes == 8, codes, torch.zeros_like(codes)))


@pytest.mark.parametrize("name", ["fp4", "mxfp4_experts", "scaled"])
def test_a_zero_keeps_its_sign(name):
    sample = SAMPLES[name][0]
    shape = (1, 32, 4) if name == "mxfp4_experts" else (2, 32)
    stored = sample.stored(shape)
    values = torch.zeros(shape)
    values[..., 1::2] = -0.0
    back = decoded(shape, sample.storage, stored | {WEIGHT: again(values, stored, sample.storage)})
    # A code that is a zero already stays as it is.
    before = decoded(shape, sample.storage, stored)
    assert torch.equal(back.signbit(), before.where(before == 0, values).signbit())
    assert not back.any()


@pytest.mark.parametrize("sample", SAMPLES["scaled"][:6], ids=lambda one: str(one.storage.settings))
def test_what_is_not_a_number_is_not_stored_as_one(sample):
    stored, values = sample.stored((130, 64)), torch.zeros(130, 64)
    values[3, 5] = torch.nan
    back = decoded((130, 64), sample.storage, stored | {WEIGHT: again(values, stored, sample.storage)})
    assert torch.equal(back.isnan(), values.isnan())


def test_levels_may_lie_in_memory_in_any_order():
    """A rule that works on columns hands over what it has turned round."""
    for samples in SAMPLES.values():
        for sample in samples:
            if sample.storage.codec == DENSE:
                continue
            shape = sample.shapes[0]
            stored, tile = stored_as(sample, shape), whole(shape)
            rows = spread(decoded(shape, sample.storage, stored)).reshape(tile.n_rows, -1)
            lines, made = lines_of(tile), []
            for is_turned in (False, True):
                out = out_of(tile, sample.storage)
                grid = grid_of(tile, rows, stored, sample.storage, out)
                levels = grid.nearest(rows.view(lines.n, lines.width))
                grid.keep(levels.T.contiguous().T if is_turned else levels)
                made.append(raw(out))
            assert made[0] == made[1], sample.storage

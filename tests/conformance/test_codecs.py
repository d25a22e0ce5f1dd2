"""What every codec that writes keeps, for plain tensors and for two codecs that only tests know. Those on stored grids are in
`test_writing_codecs.py`.

Parts and ranges fit together, tiles make up the whole, decoding gives back what was encoded within the bound, and what was
decoded is encoded as it was.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from lora_merge.codecs import CODECS, ENCODERS
from lora_merge.core.tensor import DTYPE_BITS, STORED_TYPES, TORCH_NAMES, TensorRef, nbytes_of
from lora_merge.core.view import View
from lora_merge.core.weight import DENSE, FLOAT32, WEIGHT, Storage, Tile, Weight
from lora_merge.formats.safetensors import tensor_digest
from lora_merge.formats.weights import WeightReader, values_of, weight_norm
from lora_merge.quantised import Surroundings, identify
from tests.toys.codecs import TOYS, encode, known

KNOWN = {DENSE: ENCODERS[DENSE], **{name: codec for name, (codec, _) in TOYS.items()}}
STORAGES = {
    DENSE: [Storage(DENSE, dtype) for dtype in TORCH_NAMES],
    **{name: [Storage(name, "I8")] for name in TOYS},
}
"""What each codec is tried with; one that is new in the table has to be here."""

SHAPES = [(1, 1), (37, 24), (256, 32), (3, 20, 16), (8, 4, 3, 3)]
each = pytest.mark.parametrize(
    ("codec", "storage"),
    [pytest.param(KNOWN[name], one, id=f"{name}-{one.dtype}") for name in KNOWN for one in STORAGES[name]],
)
of_every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def drawn(shape, seed=0):
    """Return random values, some of them zero, and a row of zeros."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values[values.abs() < 0.2] = 0
    values[-1] = 0
    return values


def buffers(ranges):
    """Return memory for the parts of a tile."""
    return {
        role: torch.zeros(one.shape, dtype=getattr(torch, STORED_TYPES[one.dtype]))
        for role, one in ranges.items()
    }


def views_of(shape):
    """Return the ways in which a weight is divided into rows."""
    return [View.of(shape), View.of(shape, stacked=True)] if len(shape) == 3 else [View.of(shape)]


def tiles_of(codec, storage, shape, view, elements=1):
    multiple, _ = codec.alignment(shape, view.n_rows, storage)
    return [Tile(shape, view.n_rows, *limits) for limits in view.tiles(elements, multiple)]


def looked_at(codec, storage, values, view, tiles):
    """Return what a codec finds out of all values, tile by tile."""
    found, rows = None, values.view(view.n_rows, -1)
    for tile in tiles if codec.survey(storage) == "tensor" else ():
        found = codec.look(rows[tile.start : tile.end], found, storage)
    return found


def encoded(codec, storage, values, view, tiles):
    """Return the bytes of each part, put together from tiles by the ranges that they name."""
    parts = codec.parts(tuple(values.shape), storage)
    content = {role: bytearray(nbytes_of(*one)) for role, one in parts.items()}
    survey, rows = looked_at(codec, storage, values, view, tiles), values.view(view.n_rows, -1)
    for tile in tiles:
        ranges = codec.ranges(tile, storage)
        out = buffers(ranges)
        encode(codec, storage, tile, rows[tile.start : tile.end].clone(), out, survey)
        for role, one in ranges.items():
            raw, at = out[role].view(-1).view(torch.uint8).numpy().tobytes(), 0
            for first, nbytes in one.ranges:
                content[role][first : first + nbytes] = raw[at : at + nbytes]
                at += nbytes
    return content


def decoded(codec, storage, content, shape, view, tiles):
    """Return the values of a whole weight, read tile by tile."""
    out = torch.full((view.n_rows, view.columns), float("nan"))
    for tile in tiles:
        parts = {}
        for role, one in codec.ranges(tile, storage).items():
            raw = b"".join(content[role][first : first + nbytes] for first, nbytes in one.ranges)
            dtype = getattr(torch, STORED_TYPES[one.dtype])
            parts[role] = torch.frombuffer(bytearray(raw), dtype=dtype).view(one.shape)
        codec.decode(tile, parts, out[tile.start : tile.end], storage)
    return out.view(shape)


@each
@of_every_shape
def test_a_part_has_a_name_and_a_size_and_the_main_one_comes_first(codec, storage, shape):
    parts = codec.parts(shape, storage)
    names = codec.names("model.layers.0.mlp.up_proj.weight", storage)
    assert list(names) == list(parts)
    assert len(set(names.values())) == len(names)
    assert parts[next(iter(parts))][0] == storage.dtype
    assert all(dtype in DTYPE_BITS for dtype, _ in parts.values())


@each
@of_every_shape
def test_the_ranges_of_the_tiles_have_every_byte_of_each_part(codec, storage, shape):
    parts = codec.parts(shape, storage)
    for view in views_of(shape):
        seen = {role: Counter() for role in parts}
        for tile in tiles_of(codec, storage, shape, view):
            for role, one in codec.ranges(tile, storage).items():
                assert one.dtype == parts[role][0]
                assert one.nbytes == nbytes_of(one.dtype, one.shape)
                for first, nbytes in one.ranges:
                    seen[role].update(range(first, first + nbytes))
        for role, one in parts.items():
            assert seen[role].keys() == set(range(nbytes_of(*one))), role


@each
@of_every_shape
def test_tiles_begin_where_the_codec_wants_them_to(codec, storage, shape):
    for view in views_of(shape):
        multiple, _ = codec.alignment(shape, view.n_rows, storage)
        tiles = tiles_of(codec, storage, shape, view)
        assert all(tile.start % view.rows % multiple == 0 for tile in tiles)
        assert [tile.start for tile in tiles[1:]] == [tile.end for tile in tiles[:-1]]
        assert (tiles[0].start, tiles[-1].end) == (0, view.n_rows)


@each
@of_every_shape
def test_tiles_of_any_size_and_view_store_the_same_bytes(codec, storage, shape):
    values = drawn(shape)
    wanted = None
    for view in views_of(shape):
        for elements in (1, 1 << 9, 1 << 19):
            tiles = tiles_of(codec, storage, shape, view, elements)
            content = encoded(codec, storage, values, view, tiles)
            wanted = wanted or content
            assert content == wanted
            assert decoded(codec, storage, content, shape, view, tiles).isfinite().all()


@each
@of_every_shape
@pytest.mark.parametrize("size", [1.0, 1e-3, 30.0])
def test_what_is_decoded_is_what_was_encoded_within_the_bound(codec, storage, shape, size):
    values, view = drawn(shape) * size, View.of(shape)
    (tile,) = [Tile(shape, view.n_rows, 0, view.n_rows)]
    out, rows = buffers(codec.ranges(tile, storage)), values.view(view.n_rows, -1)
    encode(codec, storage, tile, rows.clone(), out, looked_at(codec, storage, values, view, [tile]))
    back = torch.empty_like(rows)
    codec.decode(tile, out, back, storage)
    bound = codec.bound(tile, rows, out, storage)
    assert ((back - rows).abs() <= bound).all()
    assert bound.isfinite().all()
    assert math.isclose(float(back.norm()), float(rows.norm()), rel_tol=0.02, abs_tol=1e-6)


@each
@of_every_shape
@pytest.mark.parametrize("is_stored_seen", [True, False])
def test_what_was_decoded_is_encoded_as_the_same_values(codec, storage, shape, is_stored_seen):
    values, view = drawn(shape), View.of(shape)
    tile = Tile(shape, view.n_rows, 0, view.n_rows)
    first, again = (buffers(codec.ranges(tile, storage)) for _ in range(2))
    survey = looked_at(codec, storage, values, view, [tile])
    encode(codec, storage, tile, values.view(view.n_rows, -1).clone(), first, survey)
    once, twice = torch.empty(2, view.n_rows, view.columns)
    codec.decode(tile, first, once, storage)
    survey = looked_at(codec, storage, once, view, [tile])
    encode(codec, storage, tile, once.clone(), again, survey, first if is_stored_seen else None)
    codec.decode(tile, again, twice, storage)
    assert torch.equal(once, twice)
    if is_stored_seen:
        assert all(torch.equal(first[role], again[role]) for role in first)


@each
@of_every_shape
def test_a_weight_is_identified_by_its_own_tensors_and_the_others_are_left(codec, storage, shape):
    def stored(name, one, size):
        names, parts = codec.names(name, one), codec.parts(size, one)
        return [TensorRef(names[role], *parts[role], "file", 0, nbytes_of(*parts[role])) for role in parts]

    own = stored("a.weight", storage, shape)
    counter = TensorRef("steps", "I64", (1,), "file", 0, 8)
    around = Surroundings({"model_type": "of_nobody"}, lambda ref: bytes(ref.nbytes))
    with known(*TOYS):
        found, others = (made := identify([*own, counter], around)).weights, made.others
    assert (list(found), others) == (["a.weight"], (counter,))
    assert (found["a.weight"].shape, found["a.weight"].storage) == (shape, storage)
    assert list(found["a.weight"].parts.values()) == own


@each
@of_every_shape
def test_any_rows_of_a_stored_weight_can_be_read(codec, storage, shape, tmp_path):
    values, names, parts = drawn(shape), codec.names("w", storage), codec.parts(shape, storage)
    refs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CODECS, storage.codec, codec)
        for view in views_of(shape):
            tiles = tiles_of(codec, storage, shape, view)
            for role, content in encoded(codec, storage, values, view, tiles).items():
                file = tmp_path / f"{role}-{view.n_rows}"
                file.write_bytes(content)
                refs[role] = TensorRef(names[role], *parts[role], str(file), 0, len(content))
            wanted = decoded(
                codec,
                storage,
                {role: (tmp_path / f"{role}-{view.n_rows}").read_bytes() for role in refs},
                shape,
                view,
                tiles,
            )
            rows = wanted.view(view.n_rows, -1)
            weight = Weight("w", shape, storage, dict(refs))
            assert torch.equal(values_of(weight), wanted)
            with WeightReader(weight, view.n_rows) as reader:
                for start, end in (
                    (0, view.n_rows),
                    (view.n_rows // 3, view.n_rows // 2 + 1),
                    (view.n_rows - 1, view.n_rows),
                ):
                    assert torch.equal(reader.values(start, end), rows[start:end])
                assert reader.digests() == {role: tensor_digest(ref) for role, ref in refs.items()}
            box = ((shape[0] // 3, shape[0]), *((0, max(1, size - 1)) for size in shape[1:]))
            part = wanted[tuple(slice(*limits) for limits in box)]
            assert math.isclose(
                weight_norm(weight, box), float(part.double().norm()), rel_tol=1e-5, abs_tol=1e-12
            )


@each
def test_a_codec_keeps_no_state(codec, storage):
    assert storage.codec in KNOWN
    assert not vars(codec)


def test_a_plain_integer_belongs_to_no_weight():
    counter, weight = (TensorRef(*one, "file", 0, 8) for one in (("n", "I64", (1,)), ("w", "F32", (1, 2))))
    found = identify([counter, weight], Surroundings({}, lambda ref: bytes(ref.nbytes)))
    assert (list(found.weights), found.others) == (["w"], (counter,))


# plain tensors: exact widening, one rounding to the nearest, ties to even

plain = pytest.mark.parametrize("dtype", TORCH_NAMES)
NOWHERE = Tile((1, 1), 1, 0, 1)


def decode(bits, dtype):
    """Return stored bit patterns as float32."""
    stored = torch.from_numpy(bits.view(np.uint8).copy()).view(getattr(torch, TORCH_NAMES[dtype])).view(1, -1)
    values = torch.empty(1, len(bits), dtype=torch.float32)
    CODECS[DENSE].decode(NOWHERE, {WEIGHT: stored}, values, Storage(DENSE, dtype))
    return values.numpy()[0]


def bits_of(values, dtype):
    """Return float32 values as stored bit patterns."""
    width = DTYPE_BITS[dtype] // 8
    out = torch.empty(1, len(values), dtype=getattr(torch, TORCH_NAMES[dtype]))
    tile = Tile((1, len(values)), 1, 0, 1)
    encode(
        ENCODERS[DENSE],
        Storage(DENSE, dtype),
        tile,
        torch.from_numpy(values.copy()).view(1, -1),
        {WEIGHT: out},
    )
    return out.view(torch.uint8).view(-1).numpy().view(np.uint16 if width == 2 else np.uint32)


def every_pattern(dtype):
    """Return every bit pattern of a dtype; of float32, a million and the special ones."""
    if DTYPE_BITS[dtype] == 16:
        return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    drawn = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    special = [0, 1, 0x80000000, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000]
    return np.concatenate([drawn, np.array(special, dtype=np.uint32)])


def rounded(values, dtype):
    """Return the bit patterns of float32 values rounded to nearest, ties to even, by integer arithmetic."""
    bits = values.view(np.uint32)
    if dtype == "F32":
        return bits
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    return ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@plain
def test_every_stored_value_comes_back_as_it_was(dtype):
    bits = every_pattern(dtype)
    values = decode(bits, dtype)
    numbers = ~np.isnan(values)
    assert np.array_equal(bits_of(values, dtype)[numbers], bits[numbers])
    again = decode(bits_of(values, dtype), dtype)
    assert np.isnan(again[~numbers]).all()
    assert (~numbers).sum() > 1


@plain
def test_widening_is_exact(dtype):
    bits = every_pattern(dtype)
    values = decode(bits, dtype)
    if dtype == "F16":
        wanted = bits.view(np.float16).astype(np.float32)
    else:
        wanted = (bits.astype(np.uint32) << (32 - DTYPE_BITS[dtype])).view(np.float32)
    assert np.array_equal(values, wanted, equal_nan=True)


@plain
def test_values_are_rounded_to_the_nearest_and_ties_to_even(dtype):
    stored = decode(every_pattern(dtype), dtype)
    numbers = np.unique(stored[np.isfinite(stored)])
    with np.errstate(over="ignore"):
        ties = ((numbers[:-1].astype(np.float64) + numbers[1:]) / 2).astype(np.float32)
        just_above, just_below = (
            np.nextafter(ties, np.float32(np.inf)),
            np.nextafter(ties, np.float32(-np.inf)),
        )
        drawn = np.random.default_rng(1).standard_normal(100_000).astype(np.float32)
        for values in (ties, just_above, just_below, drawn, drawn * np.float32(1e-6)):
            assert np.array_equal(bits_of(values, dtype), rounded(values, dtype))


@plain
def test_what_no_number_can_hold_becomes_infinite_and_nan_stays_nan(dtype):
    beyond = np.array([np.inf, -np.inf, np.nan], dtype=np.float32)
    back = decode(bits_of(beyond, dtype), dtype)
    assert np.array_equal(back, beyond, equal_nan=True)
    if dtype != "F32":
        largest = np.array([3.4028235e38, -3.4028235e38], dtype=np.float32)
        assert np.isinf(decode(bits_of(largest, dtype), dtype)).all()


@plain
def test_what_is_computed_where_it_is_stored_stays_as_it_is(dtype):
    values = torch.arange(6, dtype=torch.float32).view(2, 3)
    CODECS[DENSE].decode(NOWHERE, {WEIGHT: values}, values, FLOAT32)
    grid = ENCODERS[DENSE].grid(Tile((2, 3), 2, 0, 2), values, {WEIGHT: values}, FLOAT32, None, None)
    grid.keep(values)
    assert values.flatten().tolist() == list(range(6))


@plain
def test_minus_zero_keeps_its_sign(dtype):
    zeros = np.array([0.0, -0.0], dtype=np.float32)
    assert np.signbit(decode(bits_of(zeros, dtype), dtype)).tolist() == [False, True]

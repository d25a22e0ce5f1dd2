"""What every codec keeps that is read, for each member of `CODECS`: tiles of any size make up the whole, and nothing else of a
part is needed than the ranges say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from lora_merge.codecs import CODECS
from lora_merge.codecs.beginning import beginning_of
from lora_merge.core.tensor import STORED_TYPES, TORCH_NAMES, TensorRef, nbytes_of
from lora_merge.core.weight import DENSE, WEIGHT, Storage, Tile, Weight
from lora_merge.formats.safetensors import tensor_digest
from lora_merge.formats.weights import WeightReader, values_of, weight_norm
from tests.decoding import decoded, is_same_in_tiles, parts_of, raw, same, storage_of, tiles_of, views_of


@dataclass(frozen=True)
class Sample:
    """A storage, shapes of weights, and a function that makes the stored parts for a shape."""

    storage: Storage
    shapes: tuple[tuple[int, ...], ...]
    stored: Callable[[tuple[int, ...]], dict[str, torch.Tensor]]


def integers(shape, low=0, high=256, dtype=torch.uint8):
    """Return random integers."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def floats(shape, dtype="F32"):
    """Return random numbers that are not zero."""
    random = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 0.05 + 0.01
    return random.to(getattr(torch, STORED_TYPES[dtype]))


def dense(dtype):
    return Sample(
        storage_of(DENSE, dtype), ((37, 24), (3, 20, 16)), lambda shape: {WEIGHT: floats(shape, dtype)}
    )


def scaled(codes, scale, block_rows, block_columns):
    def stored(shape):
        *stack, rows, columns = shape
        grid = (*stack, -(-rows // (block_rows or rows)), -(-columns // (block_columns or columns)))
        scales = integers(grid, 110, 130) if scale in {"U8", "F8_E8M0"} else floats(grid, scale)
        return {WEIGHT: integers(shape, 0, 120), "scale": scales}

    of = storage_of(
        "scaled", codes, codes=codes, scale=scale, block_rows=block_rows, block_columns=block_columns
    )
    return Sample(of, ((300, 200), (3, 140, 96)), stored)


def fp4(group, scale, of_tensor):
    def stored(shape):
        *lines, width = shape
        parts = {
            WEIGHT: integers((*lines, width // 2)),
            "scale": integers((*lines, width // group), 60, 120),
        }
        return parts if of_tensor == "none" else parts | {"global": floats(())}

    of = storage_of("fp4", "U8", **{"group": group, "scale": scale, "global": of_tensor})
    return Sample(of, ((150, 96), (3, 70, 64)), stored)


def experts(shape):
    n, n_in, n_out = shape
    return {
        WEIGHT: integers((n, n_out, n_in // 32, 16)),
        "scale": integers((n, n_out, n_in // 32), 110, 130),
    }


def rows_of_int8(shape):
    return {WEIGHT: integers(shape, -128, 128, torch.int8), "scale": floats(shape[:1])}


def words(shape):
    """Return random words."""
    return integers(shape, -(1 << 31), 1 << 31, torch.int32)


def packed_int(bits, group, *, zero=False, g_idx=False):
    def stored(shape):
        *stack, rows, columns = shape
        groups = -(-columns // (group or columns))
        parts = {
            WEIGHT: words((*stack, rows, -(-columns * bits // 32))),
            "scale": floats((*stack, rows, groups), "BF16"),
        }
        if zero:
            parts["zero"] = words((*stack, -(-rows * bits // 32), groups))
        return parts | ({"g_idx": integers((columns,), 0, groups, torch.int32)} if g_idx else {})

    of = storage_of("packed_int", "I32", bits=bits, group=group, scale="BF16", zero=zero, g_idx=g_idx)
    return Sample(of, ((300, 100),) if g_idx else ((300, 100), (3, 150, 36)), stored)


def mlx_affine(bits, group):
    def stored(shape):
        *lines, columns = shape
        by_group = floats((*lines, columns // group), "F16")
        return {WEIGHT: words((*lines, columns * bits // 32)), "scale": by_group, "bias": by_group / 2}

    of = storage_of("mlx_affine", "U32", bits=bits, group=group, scale="F16")
    return Sample(of, ((300, 96), (3, 150, 64)), stored)


def gptq(bits, version, groups):
    def stored(shape):
        n_out, n_in = shape
        return {
            WEIGHT: words((-(-n_in * bits // 32), n_out)),
            "zero": words((groups, -(-n_out * bits // 32))),
            "scale": floats((groups, n_out), "F16"),
            "g_idx": integers((n_in,), 0, groups, torch.int32),
        }

    of = storage_of("gptq", "I32", bits=bits, version=version, scale="F16", groups=groups)
    return Sample(of, ((320, 96), (9, 32)), stored)


def awq(group):
    def stored(shape):
        n_out, n_in = shape
        groups = n_in // (group or n_in)
        return {
            WEIGHT: words((n_in, n_out // 8)),
            "zero": words((groups, n_out // 8)),
            "scale": floats((groups, n_out), "F16"),
        }

    return Sample(storage_of("awq", "I32", group=group, scale="F16"), ((320, 96), (8, 32)), stored)


def bnb4(block, nested, shapes):
    def stored(shape):
        n = math.prod(shape)
        blocks = -(-n // block)
        parts = {WEIGHT: integers((-(-n // 2), 1)), "table": floats((16,))}
        if not nested:
            return parts | {"absmax": floats((blocks,))}
        tables = {"nested_absmax": floats((-(-blocks // nested),)), "nested_table": floats((256,))}
        return parts | {"absmax": integers((blocks,))} | tables

    of = storage_of("bnb4", "U8", block=block, nested=nested, offset=0.5 if nested else 0.0)
    return Sample(of, shapes, stored)


def modelopt_awq(pre):
    def stored(shape):
        *stack, n_out, n_in = shape
        parts = {
            WEIGHT: integers((*stack, n_out // 2, n_in)),
            "scale": floats((*stack, n_out, -(-n_in // 128))),
        }
        return parts | ({"pre_quant_scale": floats((n_in,), pre)} if pre else {})

    of = storage_of("modelopt_awq", "U8", group=128, scale="F32", pre=pre)
    return Sample(of, ((300, 200), (2, 128), (3, 150, 128)), stored)


SAMPLES = {
    DENSE: [dense(dtype) for dtype in TORCH_NAMES],
    "scaled": [
        scaled("F8_E4M3", "F32", 128, 128),
        scaled("F8_E4M3", "F8_E8M0", 128, 128),
        scaled("F8_E4M3", "F32", 0, 0),
        scaled("F8_E4M3", "BF16", 1, 0),
        scaled("F8_E5M2", "F32", 0, 1),
        scaled("F8_E4M3", "U8", 1, 32),
        scaled("I8", "F16", 1, 0),
    ],
    "fp4": [fp4(32, "E8M0", "none"), fp4(16, "E4M3", "divide"), fp4(16, "E4M3", "multiply")],
    "mxfp4_experts": [Sample(storage_of("mxfp4_experts", "U8"), ((1, 32, 5), (3, 160, 48)), experts)],
    "llm_int8": [Sample(storage_of("llm_int8", "I8"), ((130, 24), (1, 3)), rows_of_int8)],
    "packed_int": [
        packed_int(4, 32),
        packed_int(8, 0),
        packed_int(3, 32, zero=True),
        packed_int(4, 32, zero=True),
        packed_int(4, 32, zero=True, g_idx=True),
    ],
    "mlx_affine": [mlx_affine(4, 32), mlx_affine(3, 32), mlx_affine(6, 32), mlx_affine(8, 32)],
    "gptq": [gptq(4, 1, 3), gptq(4, 2, 1), gptq(3, 1, 2), gptq(2, 1, 2), gptq(8, 1, 2)],
    "awq": [awq(32), awq(0)],
    "bnb4": [
        bnb4(64, 0, ((300, 96), (7, 9), (3, 150, 20))),
        bnb4(64, 256, ((700, 96), (300, 128))),
    ],
    "modelopt_awq": [modelopt_awq(""), modelopt_awq("BF16")],
}
"""What each codec is tried with. One that is new in the table needs a line here."""


def named(sample, shape):
    settings = "-".join(str(value) for _, value in sample.storage.settings)
    return f"{sample.storage.codec}-{sample.storage.dtype}-{settings}-{shape}"


CASES = [
    pytest.param(sample, shape, id=named(sample, shape))
    for samples in SAMPLES.values()
    for sample in samples
    for shape in sample.shapes
]
each = pytest.mark.parametrize(("sample", "shape"), CASES)
SIZES = (1, 1 << 12, 1 << 19)


def every_tile(sample, shape):
    """Return the tiles of merges of several sizes, in every view."""
    return [
        tile
        for view in views_of(shape)
        for size in SIZES
        for tile in tiles_of(shape, sample.storage, view, size)
    ]


def test_every_codec_has_a_sample():
    assert SAMPLES.keys() == CODECS.keys()
    assert all(sample.storage.codec == name for name, found in SAMPLES.items() for sample in found)


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_keeps_no_state(name):
    assert not vars(CODECS[name])


@each
def test_ranges_are_within_their_parts_and_fill_the_shape(sample, shape):
    stored = sample.stored(shape)
    for tile in every_tile(sample, shape):
        for role, one in CODECS[sample.storage.codec].ranges(tile, sample.storage).items():
            size = len(raw(stored[role]))
            assert one.dtype in STORED_TYPES
            assert one.nbytes == nbytes_of(one.dtype, one.shape)
            assert all(0 <= first < first + nbytes <= size for first, nbytes in one.ranges), role


@each
def test_tiles_name_the_same_parts_and_name_them_again(sample, shape):
    codec = CODECS[sample.storage.codec]
    tiles = every_tile(sample, shape)
    found = [codec.ranges(tile, sample.storage) for tile in tiles]
    assert [codec.ranges(tile, sample.storage) for tile in tiles] == found
    roles = list(found[0])
    assert WEIGHT in roles
    assert all(list(one) == roles for one in found)
    assert all(one[role].dtype == found[0][role].dtype for one in found for role in roles)


@each
def test_all_bytes_of_the_codes_are_read(sample, shape):
    size = len(raw(sample.stored(shape)[WEIGHT]))
    for view in views_of(shape):
        seen = bytearray(size)
        for tile in tiles_of(shape, sample.storage, view, 1):
            for first, nbytes in CODECS[sample.storage.codec].ranges(tile, sample.storage)[WEIGHT].ranges:
                seen[first : first + nbytes] = b"\1" * nbytes
        assert all(seen)


@each
def test_tiles_begin_where_the_codec_wants_them_to(sample, shape):
    for view in views_of(shape):
        rows, columns = CODECS[sample.storage.codec].alignment(shape, view.n_rows, sample.storage)
        assert rows >= 1
        assert columns >= 1
        tiles = tiles_of(shape, sample.storage, view, 1)
        assert all(tile.start % view.rows % rows == 0 for tile in tiles)


@each
def test_tiles_of_every_size_make_up_the_whole(sample, shape):
    assert is_same_in_tiles(shape, sample.storage, sample.stored(shape))


@each
def test_every_value_of_a_tile_is_written_and_no_other(sample, shape):
    stored, codec = sample.stored(shape), CODECS[sample.storage.codec]
    for tile in every_tile(sample, shape):
        found = []
        for fill in (-12345.0, math.nan):
            around = torch.full((tile.end - tile.start + 2, math.prod(shape) // tile.n_rows), fill)
            codec.decode(tile, parts_of(tile, stored, sample.storage), around[1:-1], sample.storage)
            assert same(around[:: len(around) - 1], torch.full_like(around[:2], fill))
            found.append(around[1:-1])
        assert found[0].isfinite().all()
        assert same(*found)


@each
def test_the_first_rows_of_a_tile_are_decoded_alone(sample, shape):
    stored, codec = sample.stored(shape), CODECS[sample.storage.codec]
    for tile in every_tile(sample, shape):
        parts = parts_of(tile, stored, sample.storage)
        whole = torch.empty(tile.end - tile.start, math.prod(shape) // tile.n_rows)
        codec.decode(tile, parts, whole, sample.storage)
        for n_rows in {1, min(5, len(whole)), len(whole)}:
            first, own = beginning_of(codec, tile, n_rows, parts, sample.storage)
            values = torch.empty(first.end - first.start, whole.shape[1])
            codec.decode(first, own, values, sample.storage)
            assert len(values) >= n_rows
            assert same(values, whole[: len(values)])


def test_the_first_rows_of_blocks_are_a_small_part_of_a_tile():
    sample = scaled("F8_E4M3", "F32", 128, 128)
    tile = Tile((300, 200), 300, 0, 300)
    parts = parts_of(tile, sample.stored((300, 200)), sample.storage)
    first, own = beginning_of(CODECS["scaled"], tile, 5, parts, sample.storage)
    assert (first.start, first.end) == (0, 5)
    assert own[WEIGHT].shape == (5, 200)


@each
def test_parts_stay_as_they_were_read(sample, shape):
    """What several tiles need alike stays in its buffer, and is decoded again."""
    stored = sample.stored(shape)
    tile = Tile(shape, shape[0], 0, shape[0])
    parts = parts_of(tile, stored, sample.storage)
    before = {role: raw(part) for role, part in parts.items()}
    first, again = torch.empty(2, shape[0], math.prod(shape[1:]))
    for out in (first, again):
        CODECS[sample.storage.codec].decode(tile, parts, out, sample.storage)
    assert {role: raw(part) for role, part in parts.items()} == before
    assert same(first, again)


@each
def test_parts_that_say_nothing_about_the_values_are_not_asked_for(sample, shape):
    tile = Tile(shape, shape[0], 0, shape[0])
    assert CODECS[sample.storage.codec].ranges(tile, sample.storage).keys() <= sample.stored(shape).keys()


@each
def test_any_rows_can_be_read_from_files(sample, shape, tmp_path):
    stored = sample.stored(shape)
    refs = {}
    for role, part in stored.items():
        # A few bytes before the part: offsets count from its beginning, not from that of the file.
        (tmp_path / role).write_bytes(b"before" + raw(part))
        code = next(code for code, name in STORED_TYPES.items() if getattr(torch, name) == part.dtype)
        refs[role] = TensorRef(role, code, tuple(part.shape), str(tmp_path / role), 6, len(raw(part)))
    weight, whole = Weight("w", shape, sample.storage, refs), decoded(shape, sample.storage, stored)
    assert same(values_of(weight), whole)
    assert math.isclose(weight_norm(weight), float(whole.double().norm()), rel_tol=1e-5)
    for view in views_of(shape):
        n, rows = view.n_rows, whole.view(view.n_rows, -1)
        with WeightReader(weight, n) as reader:
            for start, end in ((0, n), (n // 3, n // 2 + 1), (n // 5, n - n // 7), (n - 1, n)):
                assert same(reader.values(start, end), rows[start:end])
            assert reader.digests() == {role: tensor_digest(ref) for role, ref in refs.items()}

"""The second decoding of every storage: hand-made parts against slow formulas, one value at a time, in Python's numbers."""

from __future__ import annotations

import contextlib
import json
import math
import random
import struct
from dataclasses import replace

import pytest
import torch

from lora_merge.checks import CHECKS, Evidence, contents, reading
from lora_merge.checks.choosing import chosen_rows
from lora_merge.checks.decoding import DECODERS
from lora_merge.checks.formulas import Site
from lora_merge.checks.reading import Reader
from lora_merge.checks.rounding import rounded
from lora_merge.core.adapter import Delta
from lora_merge.core.checkpoint import ConfigPatch
from lora_merge.core.plan import Merge, MergePlan, Step
from lora_merge.core.tensor import TensorRef
from lora_merge.core.view import View
from lora_merge.core.weight import WEIGHT, Storage, Weight
from lora_merge.deltas import LowRankFacts

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
FLOAT32 = 2.0**-24
TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def safetensors(path, parts):
    """Write parts ``{name: (dtype, shape, bytes)}`` to a file, and return where each is."""
    header, at = {}, 0
    for name, (dtype, shape, content) in parts.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(content)]}
        at += len(content)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(
        struct.pack("<Q", len(text)) + text + b"".join(content for _, _, content in parts.values())
    )
    starts = {name: 8 + len(text) + row["data_offsets"][0] for name, row in header.items()}
    return {
        name: TensorRef(name, dtype, tuple(shape), str(path), starts[name], len(content))
        for name, (dtype, shape, content) in parts.items()
    }


@pytest.fixture
def weight_of(tmp_path):
    """Return a function (codec, shape, parts, settings) → a stored weight."""

    def make(codec, shape, parts, **settings):
        refs = safetensors(tmp_path / f"{codec}.safetensors", parts)
        return Weight("w", shape, Storage(codec, parts[WEIGHT][0], tuple(sorted(settings.items()))), refs)

    return make


def drawn(seed, n):
    """Return random bytes."""
    return random.Random(seed).randbytes(n)


def floats(seed, dtype, n):
    """Return random positive numbers of a dtype: as Python has them, and as bytes."""
    values = torch.rand(n, generator=torch.Generator().manual_seed(seed)).add_(0.01).to(TYPES[dtype])
    return values.double().tolist(), values.view(torch.uint8).numpy().tobytes()


def field(content, at, bits):
    """Return the integer of some bits that begins at a bit of a little-endian stream."""
    return int.from_bytes(content, "little") >> at & (1 << bits) - 1


def pieces(content, n):
    """Return a stream cut into n of one size."""
    size = len(content) // n
    return [content[k * size : (k + 1) * size] for k in range(n)]


def packed(rows, bits):
    """Return rows of integers as streams of words, the lowest bit first."""
    found = b""
    for row in rows:
        number = sum(value << k * bits for k, value in enumerate(row))
        found += number.to_bytes(4 * -(-len(row) * bits // 32), "little")
    return found


def down(rows, bits):
    """Return integers packed along the columns: words of ``[height, columns]``."""
    columns = [packed([column], bits) for column in zip(*rows, strict=True)]
    words = [struct.unpack(f"<{len(one) // 4}I", one) for one in columns]
    return b"".join(struct.pack("<I", word) for row in zip(*words, strict=True) for word in row)


def decoded(weight, rows, n_rows):
    with contextlib.ExitStack() as stack:
        return Reader(stack).weight(weight, rows, n_rows)


def check(weight, wanted):
    """Compare any rows of a weight, divided in every way that it may be, with values in the order of the weight."""
    matrices = math.prod(weight.shape[:-1])
    wanted = torch.tensor(wanted, dtype=torch.float64)
    for n_rows in {weight.shape[0], matrices}:
        whole = wanted.view(n_rows, -1)
        for rows in (
            range(n_rows),
            [0],
            [n_rows - 1],
            sorted({0, n_rows // 2, n_rows - 1}),
            [n_rows - 1, 0, n_rows - 1],
        ):
            values, off = decoded(weight, rows, n_rows)
            assert values.dtype == torch.float64
            # The products of float64 itself are rounded where three of them follow each other.
            assert torch.allclose(values, whole[list(rows)], rtol=2.0**-50, atol=0, equal_nan=True)
            assert off.shape == values.shape


def test_every_codec_that_has_a_decoder_is_tested_here():
    assert DECODERS.keys() == {
        "dense", "scaled", "fp4", "mxfp4_experts", "packed_int", "mlx_affine", "gptq", "awq", "bnb4", "llm_int8",
        "modelopt_awq",
    }  # fmt: skip


# codes of eight bits


def test_every_code_of_eight_bits_has_the_value_that_torch_gives_it():
    for dtype, kind in (
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2", torch.float8_e5m2),
        ("F8_E8M0", torch.float8_e8m0fnu),
    ):
        codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
        ours = reading.Raw(codes, "U8").floats(dtype)
        assert torch.equal(ours.nan_to_num(nan=7e99), codes.view(kind).double().nan_to_num(nan=7e99)), dtype
        assert ours.isnan().any()


E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist()
BYTES = {
    "F8_E4M3": E4M3,
    "F8_E5M2": torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2).double().tolist(),
    "I8": [code - 256 if code > 127 else code for code in range(256)],
}


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7)])
@pytest.mark.parametrize("block", [(2, 3), (1, 0), (0, 0), (1, 4), (8, 8)])
@pytest.mark.parametrize(
    ("codes", "stored", "scale"),
    [
        ("F8_E4M3", "F8_E4M3", "F32"),
        ("F8_E5M2", "F8_E5M2", "BF16"),
        ("I8", "I8", "F16"),
        ("F8_E4M3", "F8_E4M3", "U8"),
        ("F8_E4M3", "F8_E4M3", "F8_E8M0"),
    ],
)
def test_scaled(codes, stored, scale, block, shape, weight_of):
    *outer, high, wide = shape
    n_matrices = math.prod(outer)
    br, bc = block[0] or high, block[1] or wide
    grid = (-(-high // br), -(-wide // bc))
    count = n_matrices * grid[0] * grid[1]
    if scale in TYPES:
        scales, raw = floats(1, scale, count)
    else:
        raw = bytes(random.Random(2).randrange(100, 150) for _ in range(count))
        scales = [2.0 ** (byte - 127) for byte in raw]
    content = drawn(3, math.prod(shape))
    parts = {WEIGHT: (stored, shape, content), "scale": (scale, (*outer, *grid), raw)}
    weight = weight_of(
        "scaled", shape, parts, codes=codes, block_rows=block[0], block_columns=block[1], scale=scale
    )
    wanted = [
        BYTES[codes][content[(m * high + i) * wide + j]] * scales[(m * grid[0] + i // br) * grid[1] + j // bc]
        for m in range(n_matrices)
        for i in range(high)
        for j in range(wide)
    ]
    check(weight, wanted)


def test_scaled_codes_may_be_words(weight_of):
    content, scales = drawn(1, 64), bytes([120, 121])
    parts = {WEIGHT: ("U32", (2, 8), content), "scale": ("U8", (2, 1), scales)}
    weight = weight_of("scaled", (2, 32), parts, codes="F8_E4M3", block_rows=1, block_columns=32, scale="U8")
    check(weight, [E4M3[content[k]] * 2.0 ** (scales[k // 32] - 127) for k in range(64)])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1, 1)])
def test_a_scale_for_all_may_have_any_number_of_axes(shape, weight_of):
    scales, raw = floats(1, "F32", 1)
    content = drawn(3, 12)
    parts = {WEIGHT: ("I8", (3, 4), content), "scale": ("F32", shape, raw)}
    weight = weight_of("scaled", (3, 4), parts, codes="I8", block_rows=0, block_columns=0, scale="F32")
    check(weight, [BYTES["I8"][code] * scales[0] for code in content])


def test_the_scale_255_is_not_a_number(weight_of):
    parts = {WEIGHT: ("F8_E4M3", (2, 32), bytes([0x38] * 64)), "scale": ("U8", (2, 1), bytes([127, 255]))}
    weight = weight_of("scaled", (2, 32), parts, codes="F8_E4M3", block_rows=1, block_columns=32, scale="U8")
    values, _ = decoded(weight, [0, 1], 2)
    assert (values[0] == 1).all()
    assert values[1].isnan().all()


def test_llm_int8(weight_of):
    scales, raw = floats(1, "F32", 3)
    content = drawn(2, 15)
    weight = weight_of("llm_int8", (3, 5), {WEIGHT: ("I8", (3, 5), content), "scale": ("F32", (3,), raw)})
    third = struct.unpack("<f", struct.pack("<f", 1 / 127))[0]
    check(weight, [BYTES["I8"][content[k]] * scales[k // 5] * third for k in range(15)])


# codes of four bits


def e2m1(code):
    return -E2M1[code - 8] if code >= 8 else E2M1[code]


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64)])
@pytest.mark.parametrize("stored", ["U8", "I8", "U32"])
@pytest.mark.parametrize(
    ("group", "scale", "how"),
    [(32, "E8M0", "none"), (16, "E4M3", "none"), (16, "E4M3", "divide"), (16, "E4M3", "multiply")],
)
def test_fp4(group, scale, how, stored, shape, weight_of):
    rows = math.prod(shape[:-1])
    content = drawn(1, rows * 32)
    raw = bytes(random.Random(2).randrange(100, 120) for _ in range(rows * 64 // group))
    width = 8 if stored == "U32" else 32
    parts = {
        WEIGHT: (stored, (*shape[:-1], width), content),
        "scale": ("U8" if scale == "E8M0" else "F8_E4M3", (*shape[:-1], 64 // group), raw),
    }
    shared = [3.7]
    if how != "none":
        shared, shared_raw = floats(4, "F32", 1 if len(shape) == 2 else shape[0])
        parts["global"] = ("F32", (len(shared),), shared_raw)
    weight = weight_of("fp4", shape, parts, group=group, scale=scale, **{"global": how})
    wanted = []
    for row in range(rows):
        g = shared[row // 3 if len(shared) > 1 else 0]
        for j in range(64):
            byte = raw[(row * 64 + j) // group]
            s = 2.0 ** (byte - 127) if scale == "E8M0" else E4M3[byte]
            s = s / g if how == "divide" else s * g if how == "multiply" else s
            wanted.append(e2m1(field(content, 4 * (row * 64 + j), 4)) * s)
    check(weight, wanted)


def test_experts_of_mxfp4_are_the_transpose_of_what_is_stored(weight_of):
    n_experts, n_in, n_out = 3, 96, 5
    content = drawn(1, n_experts * n_out * n_in // 2)
    raw = bytes(random.Random(2).randrange(100, 140) for _ in range(n_experts * n_out * n_in // 32))
    parts = {
        WEIGHT: ("U8", (n_experts, n_out, n_in // 32, 16), content),
        "scale": ("U8", (n_experts, n_out, n_in // 32), raw),
    }
    weight = weight_of("mxfp4_experts", (n_experts, n_in, n_out), parts)
    wanted = [
        e2m1(field(content, 4 * ((e * n_out + o) * n_in + i), 4))
        * 2.0 ** (raw[((e * n_out + o) * n_in + i) // 32] - 127)
        for e in range(n_experts)
        for i in range(n_in)
        for o in range(n_out)
    ]
    check(weight, wanted)


# integers of a few bits


def numbers(seed, bits, *sizes):
    """Return random integers below 2ᵇ, in lists of lists."""
    chance = random.Random(seed)

    def some(sizes):
        if not sizes:
            return chance.randrange(1 << bits)
        return [some(sizes[1:]) for _ in range(sizes[0])]

    return some(sizes)


@pytest.mark.parametrize("has_order", [False, True], ids=["plain", "order"])
@pytest.mark.parametrize("has_zero", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("shape", "group"), [((37, 40), 16), ((37, 40), 0), ((2, 11, 40), 8)])
def test_packed_int(bits, shape, group, has_zero, has_order, weight_of):
    *outer, high, wide = shape
    n_matrices, size = math.prod(outer), group or wide
    n_groups = -(-wide // size)
    codes = numbers(1, bits, n_matrices, high, wide)
    scales, raw = floats(2, "BF16", n_matrices * high * n_groups)
    words = -(-wide * bits // 32)
    parts = {
        WEIGHT: ("I32", (*outer, high, words), b"".join(packed(matrix, bits) for matrix in codes)),
        "scale": ("BF16", (*outer, high, n_groups), raw),
    }
    zeros = [[[1 << bits - 1] * n_groups] * high] * n_matrices
    if has_zero:
        zeros = numbers(3, bits, n_matrices, high, n_groups)
        tall = -(-high * bits // 32)
        parts["zero"] = ("I32", (*outer, tall, n_groups), b"".join(down(matrix, bits) for matrix in zeros))
    order = [[j // size for j in range(wide)]] * n_matrices
    if has_order:
        order = [random.Random(m).choices(range(n_groups), k=wide) for m in range(n_matrices)]
        parts["g_idx"] = ("I32", (*outer, wide), b"".join(struct.pack(f"<{wide}i", *one) for one in order))
    weight = weight_of(
        "packed_int", shape, parts, bits=bits, group=group, scale="BF16", zero=has_zero, g_idx=has_order
    )
    wanted = [
        (codes[m][i][j] - zeros[m][i][order[m][j]]) * scales[(m * high + i) * n_groups + order[m][j]]
        for m in range(n_matrices)
        for i in range(high)
        for j in range(wide)
    ]
    check(weight, wanted)


def test_packed_int_whose_index_was_never_filled_has_groups_in_order(weight_of):
    codes, (scales, raw) = numbers(1, 4, 3, 64), floats(2, "BF16", 6)
    parts = {
        WEIGHT: ("I32", (3, 8), packed(codes, 4)),
        "scale": ("BF16", (3, 2), raw),
        "g_idx": ("I32", (64,), struct.pack("<64i", *[-1] * 64)),
    }
    weight = weight_of("packed_int", (3, 64), parts, bits=4, group=32, scale="BF16", zero=False, g_idx=True)
    check(weight, [(codes[i][j] - 8) * scales[2 * i + j // 32] for i in range(3) for j in range(64)])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64)])
def test_mlx_affine(bits, shape, weight_of):
    rows = math.prod(shape[:-1])
    codes = numbers(1, bits, rows, 64)
    scales, raw = floats(2, "F16", rows * 2)
    biases, raw_bias = floats(3, "F16", rows * 2)
    small = ("F16", (*shape[:-1], 2))
    parts = {
        WEIGHT: ("U32", (*shape[:-1], 2 * bits), packed(codes, bits)),
        "scale": (*small, raw),
        "bias": (*small, raw_bias),
    }
    weight = weight_of("mlx_affine", shape, parts, bits=bits, group=32, scale="F16")
    wanted = [
        codes[i][j] * scales[2 * i + j // 32] + biases[2 * i + j // 32]
        for i in range(rows)
        for j in range(64)
    ]
    check(weight, wanted)


def awkward_zeros(bits, n_groups, n_out):
    """Return zero points among which are runs of zeros: version 1 borrows there from the next field."""
    found = numbers(4, bits, n_groups, n_out)
    for group in found:
        group[0:3] = [0, 0, 1]
        group[-1] = (1 << bits) - 1
    return found


def stored_zeros(zeros, bits, version):
    """Return zero points as each version stores them: as they are, or less one in every field of a word at once."""
    if version == 1 and bits == 3:
        return packed([[z - 1 & 7 for z in group] for group in zeros], bits)
    content = packed(zeros, bits)
    if version == 2:
        return content
    ones = sum(1 << at for at in range(0, 32, bits))
    words = struct.unpack(f"<{len(content) // 4}I", content)
    return struct.pack(f"<{len(words)}I", *((word - ones) % (1 << 32) for word in words))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n_out", [32, 2112])
def test_gptq(bits, version, n_out, weight_of):
    n_in, n_groups = 32, 3
    codes, zeros = numbers(1, bits, n_in, n_out), awkward_zeros(bits, n_groups, n_out)
    scales, raw = floats(2, "F16", n_groups * n_out)
    order = random.Random(3).choices(range(n_groups), k=n_in)
    parts = {
        WEIGHT: ("I32", (n_in * bits // 32, n_out), down(codes, bits)),
        "zero": ("I32", (n_groups, n_out * bits // 32), stored_zeros(zeros, bits, version)),
        "scale": ("F16", (n_groups, n_out), raw),
        "g_idx": ("I32", (n_in,), struct.pack(f"<{n_in}i", *order)),
    }
    weight = weight_of("gptq", (n_out, n_in), parts, bits=bits, version=version, scale="F16", groups=n_groups)
    wanted = [
        (codes[j][i] - zeros[order[j]][i]) * scales[order[j] * n_out + i]
        for i in range(n_out)
        for j in range(n_in)
    ]
    check(weight, wanted)


@pytest.mark.parametrize(("group", "n_out"), [(16, 24), (0, 24), (16, 2064)])
def test_awq(group, n_out, weight_of):
    n_in, places = 48, [0, 4, 1, 5, 2, 6, 3, 7]
    size = group or n_in
    n_groups = n_in // size
    codes, zeros = numbers(1, 4, n_in, n_out), numbers(2, 4, n_groups, n_out)
    scales, raw = floats(3, "BF16", n_groups * n_out)

    def words(rows):
        return b"".join(
            struct.pack("<I", sum(row[at + k] << 4 * places[k] for k in range(8)))
            for row in rows
            for at in range(0, n_out, 8)
        )

    parts = {
        WEIGHT: ("I32", (n_in, n_out // 8), words(codes)),
        "zero": ("I32", (n_groups, n_out // 8), words(zeros)),
        "scale": ("BF16", (n_groups, n_out), raw),
    }
    weight = weight_of("awq", (n_out, n_in), parts, group=group, scale="BF16")
    wanted = [
        (codes[j][i] - zeros[j // size][i]) * scales[j // size * n_out + i]
        for i in range(n_out)
        for j in range(n_in)
    ]
    check(weight, wanted)


def float32(number):
    return struct.unpack("<f", struct.pack("<f", number))[0]


@pytest.mark.parametrize("is_nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", [(5, 64), (6, 25), (4, 200)])
def test_bnb4(shape, is_nested, weight_of):
    n, block, nested = math.prod(shape), 8, 4
    codes = numbers(1, 4, n)
    n_blocks = -(-n // block)
    table, table_raw = floats(2, "F32", 16)
    scales, raw = floats(3, "F32", n_blocks)
    content = bytes(high << 4 | low for high, low in zip(codes[::2], codes[1::2], strict=True))
    parts = {
        WEIGHT: ("U8", (n // 2, 1), content),
        "absmax": ("F32", (n_blocks,), raw),
        "table": ("F32", (16,), table_raw),
    }
    settings = {"block": block, "nested": 0, "offset": 0.0}
    if is_nested:
        raw = drawn(4, n_blocks)
        outer, outer_raw = floats(5, "F32", -(-n_blocks // nested))
        inner, inner_raw = floats(6, "F32", 256)
        settings |= {"nested": nested, "offset": float32(0.37)}
        parts |= {
            "absmax": ("U8", (n_blocks,), raw),
            "nested_absmax": ("F32", (len(outer),), outer_raw),
            "nested_table": ("F32", (256,), inner_raw),
        }
        scales = [
            float32(float32(inner[raw[k]] * outer[k // nested]) + settings["offset"]) for k in range(n_blocks)
        ]
    weight = weight_of("bnb4", shape, parts, **settings)
    check(weight, [table[codes[k]] * scales[k // block] for k in range(n)])


@pytest.mark.parametrize("has_pre", [False, True])
def test_modelopt_awq(has_pre, weight_of):
    n_out, n_in, group = 6, 32, 16
    codes = numbers(1, 4, n_out, n_in)
    content = bytes(
        codes[2 * i][j] | codes[2 * i + 1][j] << 4 for i in range(n_out // 2) for j in range(n_in)
    )
    scales, raw = floats(2, "F32", n_out * 2)
    pre, raw_pre = floats(3, "BF16", n_in)
    parts = {WEIGHT: ("U8", (n_out // 2, n_in), content), "scale": ("F32", (n_out, 2), raw)}
    if has_pre:
        parts["pre_quant_scale"] = ("BF16", (n_in,), raw_pre)
    weight = weight_of(
        "modelopt_awq", (n_out, n_in), parts, group=group, scale="F32", pre="BF16" if has_pre else ""
    )
    wanted = [
        (codes[i][j] - 16 * (codes[i][j] >= 8)) * scales[2 * i + j // group] * (pre[j] if has_pre else 1)
        for i in range(n_out)
        for j in range(n_in)
    ]
    check(weight, wanted)


# what is read


def test_a_row_of_blocks_is_read_alone(weight_of, monkeypatch):
    n_bytes = 0

    def counted(stream, start, size, at=contents.content_at):
        nonlocal n_bytes
        n_bytes += size
        return at(stream, start, size)

    for module in (contents, reading):
        monkeypatch.setattr(module, "content_at", counted)
    parts = {WEIGHT: ("F8_E4M3", (512, 256), bytes(512 * 256)), "scale": ("F32", (4, 2), bytes(32))}
    weight = weight_of(
        "scaled", (512, 256), parts, codes="F8_E4M3", block_rows=128, block_columns=128, scale="F32"
    )
    decoded(weight, [200, 201], 512)
    assert n_bytes == 2 * 256 + 2 * 4


def test_of_a_wide_part_only_the_columns_are_read(weight_of, monkeypatch):
    sizes = []

    def counted(stream, start, size, at=contents.content_at):
        sizes.append(size)
        return at(stream, start, size)

    for module in (contents, reading):
        monkeypatch.setattr(module, "content_at", counted)
    n_in, n_out = 64, 4096
    parts = {
        WEIGHT: ("I32", (8, n_out), bytes(32 * n_out)),
        "zero": ("I32", (2, n_out // 8), bytes(n_out)),
        "scale": ("F16", (2, n_out), bytes(4 * n_out)),
        "g_idx": ("I32", (n_in,), bytes(4 * n_in)),
    }
    weight = weight_of("gptq", (n_out, n_in), parts, bits=4, version=1, scale="F16", groups=2)
    decoded(weight, [0, n_out - 1], n_out)
    assert sizes.count(4) == 2 * 8


def test_parts_may_be_in_a_pickle(tmp_path):
    codes = torch.arange(-6, 6, dtype=torch.int8).view(3, 4)
    scale = torch.tensor([0.5, 2.0, 3.0])
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": codes.to(torch.float8_e4m3fn), "s": scale}, path)
    refs = {
        WEIGHT: TensorRef("w", "F8_E4M3", (3, 4), str(path), 0, 12),
        "scale": TensorRef("s", "F32", (3,), str(path), 0, 12),
    }
    settings = {"codes": "F8_E4M3", "block_rows": 1, "block_columns": 0, "scale": "F32"}
    weight = Weight("w", (3, 4), Storage("scaled", "F8_E4M3", tuple(settings.items())), refs)
    values, _ = decoded(weight, [1, 2], 3)
    assert torch.equal(values, (codes.double() * scale.double()[:, None])[1:])


# how far float32 may be


def test_float32_is_within_the_slack_where_a_sum_cancels(weight_of):
    rows = 16
    codes = numbers(1, 8, rows, 64)
    scales = torch.rand(rows, 2, generator=torch.Generator().manual_seed(2)) * 0.3
    biases = -scales * 128.01
    parts = {
        WEIGHT: ("U32", (rows, 16), packed(codes, 8)),
        "scale": ("F32", (rows, 2), scales.numpy().tobytes()),
        "bias": ("F32", (rows, 2), biases.numpy().tobytes()),
    }
    weight = weight_of("mlx_affine", (rows, 64), parts, bits=8, group=32, scale="F32")
    values, off = decoded(weight, range(rows), rows)
    spread = [one.repeat_interleave(32, 1) for one in (scales, biases)]
    error = (torch.tensor(codes).float() * spread[0] + spread[1]).double() - values
    assert (error.abs() <= off).all()
    assert (error.abs() > 2 * FLOAT32 * values.abs()).any()


def test_the_slack_is_part_of_what_a_merged_value_may_be_off(weight_of):
    rows = 64
    content = drawn(1, rows * 32)
    scales = torch.rand(rows, generator=torch.Generator().manual_seed(2))
    parts = {WEIGHT: ("I8", (rows, 32), content), "scale": ("F32", (rows,), scales.numpy().tobytes())}
    weight = weight_of("llm_int8", (rows, 32), parts)
    codes = torch.tensor([BYTES["I8"][code] for code in content], dtype=torch.float32).view(rows, 32)
    # As the library has it: two products, each rounded.
    single = (codes * scales[:, None] * torch.tensor(1 / 127, dtype=torch.float32)).double()
    op = Merge(weight, Storage("dense", "F32"), (), View.of((rows, 32)))
    with contextlib.ExitStack() as stack:
        exact, off = Site(Reader(stack), op, range(rows), "F32").start(range(rows))
    assert ((exact - single).abs() <= off).all()
    # Without it the check would find fault with some.
    assert not torch.equal(rounded(exact, "F32"), single)
    assert torch.equal(off, 2 * (FLOAT32 * exact.abs() + 2.0**-146))


def test_a_plain_tensor_has_no_slack(weight_of):
    values, off = decoded(weight_of("dense", (2, 3), {WEIGHT: ("F32", (2, 3), bytes(24))}), [0, 1], 2)
    assert off.shape == values.shape
    assert not off.any()


# decoded weights in the check of values


def plan_of(step):
    return MergePlan("", (), (), (), (step,), (), ConfigPatch(), "", ())


@pytest.fixture
def written(weight_of, tmp_path):
    """Return a function (shape, dtype, change of the values) → the evidence of a weight that was decoded, and not merged."""

    def make(shape, dtype="BF16", change=None, added=None, deltas=()):
        rows, wide = math.prod(shape[:-1]), shape[-1]
        codes = bytes(random.Random(1).randrange(0, 0x7E) for _ in range(rows * wide))
        scales, raw = floats(2, "F32", rows)
        parts = {WEIGHT: ("F8_E4M3", shape, codes), "scale": ("F32", (*shape[:-1], 1), raw)}
        weight = weight_of(
            "scaled", shape, parts, codes="F8_E4M3", block_rows=1, block_columns=0, scale="F32"
        )
        values = torch.tensor([E4M3[code] for code in codes]).view(rows, wide)
        values *= torch.tensor(scales, dtype=torch.float32)[:, None]
        values = (values if added is None else values + added).to(TYPES[dtype])
        if change:
            change(values)
        out = tmp_path / "out"
        out.mkdir()
        content = values.contiguous().view(torch.uint8).numpy().tobytes()
        (slot,) = safetensors(out / "model.safetensors", {"w": (dtype, shape, content)}).values()
        slot = replace(slot, file="model.safetensors")
        op = Merge(weight, Storage("dense", dtype), deltas, View.of(shape))
        return Evidence(plan_of(Step("w", {WEIGHT: slot}, op)), out, (), "sample")

    return make


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(40, 24), (3, 40, 24)])
def test_what_was_decoded_and_rounded_passes(shape, dtype, written):
    assert list(CHECKS["recompute"](written(shape, dtype))) == []


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(40, 24), (3, 40, 24)])
def test_a_value_that_is_off_by_two_steps_is_found(shape, dtype, written):
    def change(values):
        values.view(torch.int32 if dtype == "F32" else torch.int16)[-3, 5] += 2

    (issue,) = CHECKS["recompute"](written(shape, dtype, change))
    assert issue.code == "wrong-value"
    row = math.prod(shape[:-1]) - 3
    assert issue.sentence.startswith(f"row {row}, column 5 is ")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("is_wrong", [False, True], ids=["right", "wrong"])
def test_a_change_of_a_decoded_weight_is_recomputed(dtype, is_wrong, written, tmp_path):
    generator = torch.Generator().manual_seed(5)
    a, b = torch.randn(4, 24, generator=generator), torch.randn(40, 4, generator=generator)
    factors = safetensors(
        tmp_path / "adapter.safetensors",
        {name: ("F32", list(one.shape), one.numpy().tobytes()) for name, one in (("A", a), ("B", b))},
    )
    delta = Delta("w", LowRankFacts(), factors, 0.5).placed("w")

    def change(values):
        values.view(torch.int32 if dtype == "F32" else torch.int16)[7, 3] += 1 << 5

    evidence = written((40, 24), dtype, change if is_wrong else None, 0.5 * (b @ a), (delta,))
    found = [(issue.code, issue.sentence[:17]) for issue in CHECKS["recompute"](evidence)]
    assert found == ([("wrong-value", "row 7, column 3 i")] if is_wrong else [])


def test_a_stack_that_is_only_decoded_is_looked_at_row_by_row(written):
    choice = chosen_rows(written((3, 40, 24)))
    assert [step.op.view for step, _ in choice.rows] == [View(3, 40, 24)]
    assert choice.n_rows == 120

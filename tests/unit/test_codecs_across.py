"""Codes whose rows lie across those of the weight: GPTQ and AWQ."""

from __future__ import annotations

import pytest
import torch

from lora_merge.codecs import CODECS
from lora_merge.core.weight import Tile
from tests.decoding import decoded, storage_of
from tests.packing import agree, drawn, packed, scales, spread

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""AWQ: which of eight outputs is in each field of a word, from the lowest bits on."""

shapes = pytest.mark.parametrize("shape", [(1, 1), (5, 7), (72, 100), (96, 64), (200, 33)])


def stored_zeros(zero, bits, version):
    """Return zeros ``[groups, out]`` as GPTQModel stores them. Version 1 subtracts 1 from all fields of a word at once, and
    from each field alone where a field may cross the border of two words.
    """
    if version == 1 and 32 % bits:
        return packed((zero - 1) % (1 << bits), bits)
    words = packed(zero, bits)
    if version == 1:
        ones = sum(1 << at for at in range(0, 32, bits))
        words = ((words.long() - ones) % (1 << 32)).to(torch.uint32).view(torch.int32)
    return words


def gptq(bits, shape, version, g_idx, *, zero=None, dtype=torch.float16):
    """Return the storage, the parts and the values of a GPTQ weight."""
    n_groups = int(g_idx.max()) + 1
    codes, scale = drawn(*shape, below=1 << bits), scales(n_groups, shape[0], dtype=dtype)
    zero = drawn(n_groups, shape[0], below=1 << bits, seed=2) if zero is None else zero
    parts = {
        "weight": packed(codes, bits).T.contiguous(),
        "zero": stored_zeros(zero, bits, version),
        "scale": scale,
        "g_idx": g_idx,
    }
    columns, code = g_idx.long(), "F16" if dtype == torch.float16 else "BF16"
    wanted = (codes.T - zero[columns]).float() * scale.float()[columns]
    settings = {"bits": bits, "groups": n_groups, "version": version, "scale": code}
    return storage_of("gptq", "I32", **settings), parts, wanted.T.contiguous()


def in_order(n_in, group):
    return torch.arange(n_in, dtype=torch.int32) // group


@shapes
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_with_groups_in_order(bits, version, shape):
    for group in (32, shape[1]):
        one, parts, wanted = gptq(bits, shape, version, in_order(shape[1], group))
        assert agree(one, parts, shape, wanted)


def test_gptq_with_scales_in_bfloat16():
    one, parts, wanted = gptq(4, (40, 64), 1, in_order(64, 32), dtype=torch.bfloat16)
    assert agree(one, parts, (40, 64), wanted)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("n_in", [96, 100])
def test_gptq_with_columns_in_the_order_of_their_activations(bits, version, n_in):
    mixed = in_order(n_in, 32)[torch.randperm(n_in, generator=torch.Generator().manual_seed(7))].contiguous()
    one, parts, wanted = gptq(bits, (70, n_in), version, mixed)
    assert agree(one, parts, (70, n_in), wanted)


def test_gptq_with_a_group_that_comes_late():
    one, parts, wanted = gptq(4, (40, 64), 1, in_order(64, 32).flip(0).contiguous())
    assert agree(one, parts, (40, 64), wanted)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_of_0_has_borrowed_from_its_neighbour(bits):
    zero = torch.zeros(2, 64, dtype=torch.long)
    zero[1, ::3] = (1 << bits) - 1
    one, parts, wanted = gptq(bits, (64, 64), 1, in_order(64, 32), zero=zero)
    assert agree(one, parts, (64, 64), wanted)


def test_a_field_of_gptq_3_bits_has_no_neighbour():
    zero = torch.zeros(1, 32, dtype=torch.long)
    _, parts, _ = gptq(3, (32, 32), 1, in_order(32, 32), zero=zero)
    assert parts["zero"].tolist() == [[-1, -1, -1]]


def test_tiles_of_gptq_begin_where_a_word_of_zeros_does():
    codec = CODECS["gptq"]
    edges = {}
    for bits in (2, 3, 4, 8):
        one, _, _ = gptq(bits, (64, 64), 1, in_order(64, 32))
        edges[bits] = codec.alignment((64, 64), 64, one)
    assert edges == {2: (16, 1), 3: (32, 1), 4: (8, 1), 8: (4, 1)}


def test_every_tile_of_gptq_and_awq_needs_the_same_bytes():
    shape = (64, 96)
    for one, parts, _ in (gptq(4, shape, 1, in_order(96, 32)), awq(shape, 32)):
        found = [CODECS[one.codec].ranges(Tile(shape, 64, *limits), one) for limits in ((0, 8), (8, 64))]
        assert found[0] == found[1]
        assert {role: ((0, part.nbytes),) for role, part in parts.items()} == {
            role: wanted.ranges for role, wanted in found[0].items()
        }


def awq_words(codes):
    """Return codes ``[n, out]`` as words of eight outputs each, in AWQ's order."""
    n = codes.shape[0]
    return packed(codes.view(n, -1, 8)[..., ORDER].reshape(n, -1), 4)


def awq(shape, group, code="F16", dtype=torch.float16):
    """Return the storage, the parts and the values of an AWQ weight."""
    n_out, n_in = shape
    n_groups = -(-n_in // (group or n_in))
    codes, zero = drawn(n_in, n_out, below=16), drawn(n_groups, n_out, below=16, seed=2)
    scale = scales(n_groups, n_out, dtype=dtype)
    parts = {"weight": awq_words(codes), "zero": awq_words(zero), "scale": scale}
    grid = spread(zero.T, group, n_in)
    wanted = (codes.T - grid).float() * spread(scale.T.float(), group, n_in)
    return storage_of("awq", "I32", group=group, scale=code), parts, wanted.contiguous()


@pytest.mark.parametrize("shape", [(8, 1), (8, 7), (72, 100), (96, 64)])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize(("code", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_awq(shape, group, code, dtype):
    one, parts, wanted = awq(shape, group, code, dtype)
    assert CODECS["awq"].alignment(shape, shape[0], one) == (8, 1)
    assert agree(one, parts, shape, wanted)


def test_one_word_of_awq_in_its_order():
    word = torch.tensor([[0x75316420]], dtype=torch.int32)
    parts = {"weight": word, "zero": word * 0, "scale": torch.ones(1, 8, dtype=torch.float16)}
    one = storage_of("awq", "I32", group=0, scale="F16")
    assert decoded((8, 1), one, parts, Tile((8, 1), 8, 0, 8)).flatten().tolist() == list(range(8))

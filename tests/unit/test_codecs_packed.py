"""Codes packed along the lines of a weight: streams of bits, compressed-tensors' packed integers, MLX's affine codes."""

from __future__ import annotations

import pytest
import torch

from lora_merge.codecs import CODECS
from lora_merge.codecs.bits import along_lines, codes_at_word_edges, unpack, words_of
from lora_merge.core.weight import Tile
from tests.decoding import decoded, storage_of
from tests.packing import agree, drawn, packed, scales, spread

each_width = pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
shapes = pytest.mark.parametrize(
    "shape", [(1, 1), (5, 7), (37, 100), (70, 64), (3, 20, 48), (2, 33, 31), (4, 1, 40)]
)


# streams of bits


@each_width
@pytest.mark.parametrize("n", [1, 31, 32, 33, 100, 256])
def test_codes_come_out_as_they_were_packed(bits, n):
    codes = drawn(3, n, below=1 << bits)
    words = packed(codes, bits)
    assert words.shape[1] == words_of(n, bits)
    assert torch.equal(unpack(words, bits, n).long(), codes)


@each_width
def test_a_stream_can_be_read_from_the_edge_of_a_word(bits):
    edge, codes = codes_at_word_edges(bits), drawn(2, 200, below=1 << bits)
    assert edge * bits % 32 == 0
    words = packed(codes, bits)[:, edge * bits // 32 :]
    assert torch.equal(unpack(words, bits, 200 - edge).long(), codes[:, edge:])


@each_width
@pytest.mark.parametrize("columns", [(0, 1), (0, 9), (3, 7), (8, 9)])
def test_codes_that_lie_across_are_turned_into_lines(bits, columns):
    codes = drawn(9, 5, below=1 << bits)
    turned = along_lines(packed(codes, bits).T.contiguous(), *columns)
    assert torch.equal(unpack(turned, bits, 5).long(), codes[slice(*columns)])


# packed_int: (code - zero) · scale


def packed_int(bits, group, *, zero=False, g_idx=False, scale="BF16"):
    return storage_of("packed_int", "I32", bits=bits, group=group, scale=scale, zero=zero, g_idx=g_idx)


@shapes
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group", [0, 32])
def test_symmetric_integers(bits, group, shape):
    codes = drawn(*shape, below=1 << bits)
    scale = scales(*shape[:-1], -(-shape[-1] // (group or shape[-1])))
    wanted = (codes - (1 << (bits - 1))).float() * spread(scale.float(), group, shape[-1])
    assert agree(packed_int(bits, group), {"weight": packed(codes, bits), "scale": scale}, shape, wanted)


def asymmetric(bits, group, shape):
    """Return the parts and the values of a weight with zeros, which are packed along ``out``."""
    codes = drawn(*shape, below=1 << bits)
    scale = scales(*shape[:-1], -(-shape[-1] // (group or shape[-1])))
    zero = drawn(*scale.shape, below=1 << bits, seed=2)
    stored = packed(zero.transpose(-1, -2), bits).transpose(-1, -2).contiguous()
    wanted = (codes - spread(zero, group, shape[-1])).float() * spread(scale.float(), group, shape[-1])
    return {"weight": packed(codes, bits), "scale": scale, "zero": stored}, wanted


@shapes
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [0, 32])
def test_asymmetric_integers(bits, group, shape):
    parts, wanted = asymmetric(bits, group, shape)
    assert agree(packed_int(bits, group, zero=True), parts, shape, wanted)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_tile_may_begin_in_one_matrix_and_end_in_another(bits):
    shape, one = (4, 70, 16), packed_int(bits, 16, zero=True)
    parts, wanted = asymmetric(bits, 16, shape)
    edge, _ = CODECS[one.codec].alignment(shape, 280, one)
    for limits in ((edge, 140), (70 + edge, 210 + edge), (0, 280), (edge, 2 * edge), (210 + edge, 280)):
        values = decoded(shape, one, parts, Tile(shape, 280, *limits))
        assert torch.equal(values, wanted.view(280, 16)[slice(*limits)]), limits
    assert torch.equal(decoded(shape, one, parts, Tile(shape, 4, 1, 3)).view(2, 70, 16), wanted[1:3])


def test_tiles_keep_to_words_of_zeros_and_to_nothing_else():
    shape, codec = (6, 96, 64), CODECS["packed_int"]
    edges = {bits: codec.alignment(shape, 576, packed_int(bits, 32, zero=True)) for bits in (2, 3, 4, 6, 8)}
    assert edges == {2: (16, 1), 3: (32, 1), 4: (8, 1), 6: (16, 1), 8: (4, 1)}
    assert codec.alignment(shape, 6, packed_int(4, 32, zero=True)) == (1, 1)
    assert codec.alignment(shape, 576, packed_int(4, 32)) == (1, 1)


@pytest.mark.parametrize("is_asymmetric", [False, True])
@pytest.mark.parametrize("order", ["mixed", "in order", "cut off", "never filled"])
def test_columns_may_belong_to_groups_in_any_order(order, is_asymmetric):
    shape, bits, group = (40, 96), 4, 32
    g_idx = torch.arange(96, dtype=torch.int32) // (40 if order == "cut off" else group)
    columns = g_idx.long()
    if order == "mixed":
        g_idx = g_idx[torch.randperm(96, generator=torch.Generator().manual_seed(3))].contiguous()
        columns = g_idx.long()
    if order == "never filled":
        g_idx = torch.full((96,), -1, dtype=torch.int32)
    parts, _ = asymmetric(bits, group, shape)
    codes, zero = drawn(*shape, below=16), drawn(40, 3, below=16, seed=2)
    if not is_asymmetric:
        zero = torch.full_like(zero, 8)
    wanted = (codes - zero[:, columns]).float() * parts["scale"].float()[:, columns]
    one = packed_int(bits, group, zero=is_asymmetric, g_idx=True)
    assert agree(one, {**parts, "g_idx": g_idx}, shape, wanted)


def test_scales_may_be_of_any_floating_dtype():
    shape, codes = (9, 64), drawn(9, 64, below=16)
    for code, dtype in {"F32": torch.float32, "F16": torch.float16}.items():
        scale = scales(9, 2, dtype=dtype)
        wanted = (codes - 8).float() * spread(scale.float(), 32, 64)
        assert agree(
            packed_int(4, 32, scale=code), {"weight": packed(codes, 4), "scale": scale}, shape, wanted
        )


# mlx_affine: code · scale + bias


def affine(bits, shape, code, dtype):
    """Return the storage, the parts and the values of a weight of MLX: the product is rounded before the sum."""
    codes, groups = drawn(*shape, below=1 << bits), -(-shape[-1] // 32)
    scale, bias = (scales(*shape[:-1], groups, dtype=dtype, seed=seed) for seed in (1, 5))
    product = codes.float() * spread(scale.float(), 32, shape[-1])
    parts = {"weight": packed(codes, bits).view(torch.uint32), "scale": scale, "bias": bias}
    one = storage_of("mlx_affine", "U32", bits=bits, group=32, scale=code)
    return one, parts, product + spread(bias.float(), 32, shape[-1])


@shapes
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_codes(bits, shape):
    one, parts, wanted = affine(bits, shape, "BF16", torch.bfloat16)
    assert CODECS["mlx_affine"].alignment(shape, shape[0], one) == (1, 1)
    assert agree(one, parts, shape, wanted)


@pytest.mark.parametrize(("code", "dtype"), [("F16", torch.float16), ("F32", torch.float32)])
def test_affine_codes_with_scales_of_other_dtypes(code, dtype):
    one, parts, wanted = affine(4, (9, 64), code, dtype)
    assert agree(one, parts, (9, 64), wanted)

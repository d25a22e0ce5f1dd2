"""Codes are packed into words as a large integer has them, and unpacked again."""

from __future__ import annotations

import pytest
import torch

from lora_merge.codecs.bits import codes_at_word_edges, pack, unpack, whole_codes, words_of
from lora_merge.codecs.tables import (
    E2M1_SIGNS,
    keep_signs_of_zeros_,
    look_up,
    look_up_e2m1,
    pack_bytes,
    pack_e2m1_,
)
from tests.packing import drawn, packed

widths = pytest.mark.parametrize("bits", range(1, 9))


@widths
@pytest.mark.parametrize("n", [1, 7, 8, 31, 32, 33, 64, 100])
def test_codes_are_packed_as_one_large_integer(bits, n):
    codes = drawn(3, n, below=1 << bits)
    words = pack(codes.to(torch.uint8), bits)
    assert words.shape == (3, words_of(n, bits))
    assert torch.equal(words, packed(codes, bits))
    assert torch.equal(unpack(words, bits, n), codes.to(torch.uint8))


@widths
def test_words_that_were_unpacked_are_packed_as_they_were(bits):
    words = torch.randint(-(1 << 31), 1 << 31, (5, 24), generator=torch.Generator().manual_seed(0)).int()
    n = words.shape[1] // (codes_at_word_edges(bits) * bits // 32) * codes_at_word_edges(bits)
    kept = words[:, : words_of(n, bits)]
    codes = unpack(kept, bits, n)
    before = codes.clone()
    assert torch.equal(pack(codes, bits), kept)
    assert torch.equal(codes, before)


def test_whole_numbers_of_a_byte_are_converted():
    assert whole_codes(torch.arange(256).float()).tolist() == list(range(256))


def test_every_pair_of_e2m1_codes_is_packed_as_it_was():
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64)
    levels, out = torch.empty(4, 128), torch.zeros_like(codes)
    look_up_e2m1(codes, levels)
    turned = levels.T.contiguous().T
    pack_e2m1_(levels, out)
    assert torch.equal(out, codes)
    pack_e2m1_(turned, out.zero_())
    assert torch.equal(out, codes)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_every_float8_is_packed_as_it_was_and_nan_stays_nan(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    levels, out, again = torch.empty(256), torch.zeros_like(codes), torch.empty(256)
    look_up(codes, dtype, levels)
    pack_bytes(levels, dtype, out)
    numbers = ~levels.isnan()
    assert (~numbers).any()
    assert torch.equal(out[numbers], codes[numbers])
    look_up(out, dtype, again)
    assert torch.equal(again.isnan(), ~numbers)


def test_every_int8_is_packed_as_it_was():
    out = torch.zeros(256, dtype=torch.int8)
    pack_bytes(torch.arange(-128, 128).float(), "I8", out)
    assert out.tolist() == list(range(-128, 128))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_of_two_zeros_the_stored_one_stays_and_other_codes_are_as_they_were(dtype):
    codes, stored = torch.arange(256).repeat(2, 256).view(2, 256, 256).to(torch.uint8)
    stored = stored.T.contiguous()
    new, old = torch.empty(codes.shape), torch.empty(codes.shape)
    look_up(codes, dtype, new)
    look_up(stored, dtype, old)
    wanted = torch.where((new == 0) & (old == 0), stored, codes)
    keep_signs_of_zeros_(codes, stored, 0x80)
    assert torch.equal(codes, wanted)


def test_of_two_e2m1_zeros_the_stored_one_stays():
    codes, stored = torch.arange(256).repeat(2, 256).view(2, 256, 256).to(torch.uint8)
    stored = stored.T.contiguous()
    new, old = torch.empty(256, 512), torch.empty(256, 512)
    look_up_e2m1(codes, new)
    look_up_e2m1(stored, old)
    wanted = torch.empty_like(codes)
    pack_e2m1_(old.where((new == 0) & (old == 0), new), wanted)
    keep_signs_of_zeros_(codes, stored, E2M1_SIGNS)
    assert torch.equal(codes, wanted)


@pytest.mark.parametrize("n_lines", [1, 700])
def test_codes_of_more_than_one_piece_are_converted_as_those_of_one(n_lines):
    """A piece has 2^19 codes or levels."""
    stored = drawn(n_lines, 1024, below=256).to(torch.uint8)
    levels, pairs = torch.empty(n_lines, 1024), torch.empty(n_lines, 2048)
    look_up(stored, "F8_E5M2", levels)
    look_up_e2m1(stored, pairs)
    out, again = torch.zeros_like(stored), torch.zeros_like(stored)
    pack_bytes(levels.nan_to_num(), "F8_E5M2", out)
    for line in (0, n_lines - 1):
        one, two = torch.empty(1024), torch.empty(2048)
        look_up(stored[line], "F8_E5M2", one)
        look_up_e2m1(stored[line], two)
        assert torch.equal(levels[line].nan_to_num(), one.nan_to_num())
        assert torch.equal(pairs[line], two)
        code = torch.zeros_like(stored[line])
        pack_bytes(one.nan_to_num(), "F8_E5M2", code)
        assert torch.equal(out[line], code)
    pack_e2m1_(pairs, again)
    assert torch.equal(again, stored)
    keep_signs_of_zeros_(again, stored ^ 0x88, E2M1_SIGNS)
    is_zero = (stored & 0x07 == 0).int() * 0x08 + (stored & 0x70 == 0).int() * 0x80
    assert torch.equal(again, stored ^ is_zero.to(torch.uint8))


def test_e4m3_with_nan_in_it_is_decoded_as_e4m3_without():
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes[(codes & 0x7F) != 0x7F]
    levels, alone = torch.empty(256), torch.empty(254)
    look_up(codes, "F8_E4M3", levels)
    look_up(numbers, "F8_E4M3", alone)
    assert int(levels.isnan().sum()) == 2
    assert torch.equal(levels[~levels.isnan()].view(torch.int32), alone.view(torch.int32))

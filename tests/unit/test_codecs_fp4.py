"""MXFP4, NVFP4 and the experts of gpt-oss, against their definitions, nibble by nibble."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from lora_merge.codecs import CODECS
from lora_merge.core.weight import Tile
from tests.decoding import decoded, is_same_in_tiles, same, storage_of

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
KINDS = [
    (32, "E8M0", "none"),
    (16, "E4M3", "divide"),
    (16, "E4M3", "multiply"),
    (16, "E4M3", "none"),
    (32, "E4M3", "none"),
]
SHAPES = [(1, 32), (64, 96), (300, 64), (3, 40, 64), (2, 100, 32)]


def drawn(shape, group, scale, of_tensor, seed=0):
    """Return all kinds of codes, and scales."""
    random = torch.Generator().manual_seed(seed)
    *lines, width = shape
    low, high = (100, 140) if scale == "E8M0" else (0, 127)
    stored = {
        "weight": torch.randint(0, 256, (*lines, width // 2), generator=random, dtype=torch.uint8),
        "scale": torch.randint(low, high, (*lines, width // group), generator=random, dtype=torch.uint8),
    }
    if of_tensor != "none":
        stored["global"] = torch.tensor([1234.567 if of_tensor == "divide" else 0.00241])
    return storage_of("fp4", "U8", **{"group": group, "scale": scale, "global": of_tensor}), stored


def nibbles(packed):
    """Return two codes for each byte, the low nibble's first."""
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    codes[..., 0::2], codes[..., 1::2] = packed % 16, packed // 16
    return codes


def meaning(codes):
    """Return E2M1 values: bit 3 is the sign, that of a zero too."""
    size = np.array(E2M1, dtype=np.float32)[codes % 8]
    return np.where(codes >= 8, -size, size)


def power(byte):
    """Return E8M0 values."""
    return np.where(
        byte == 255, np.float32(math.nan), np.exp2(byte.astype(np.float64) - 127).astype(np.float32)
    )


def expected(storage, stored):
    """Return each code's value times the scale of its group, to which the global scale is applied first."""
    of = dict(storage.settings)
    scale = stored["scale"].view(torch.uint8)
    if of["scale"] == "E8M0":
        scales = power(scale.numpy())
    else:
        scales = scale.view(torch.float8_e4m3fn).float().numpy()
    if of["global"] == "divide":
        scales = scales / stored["global"].numpy().reshape(-1)
    if of["global"] == "multiply":
        scales = scales * stored["global"].numpy().reshape(-1)
    values = meaning(nibbles(stored["weight"].view(torch.uint8).numpy()))
    return torch.from_numpy(values * np.repeat(scales, of["group"], -1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_value_is_its_code_times_the_scale_of_its_group(shape, kind):
    storage, stored = drawn(shape, *kind)
    assert same(decoded(shape, storage, stored), expected(storage, stored))
    assert is_same_in_tiles(shape, storage, stored)


def test_each_of_the_sixteen_codes_means_what_the_format_says():
    storage, stored = drawn((1, 32), 32, "E8M0", "none")
    stored["weight"] = torch.tensor(
        [[k * 2 | (k * 2 + 1) << 4 for k in (*range(8), *range(8))]], dtype=torch.uint8
    )
    stored["scale"].fill_(127)
    values = decoded((1, 32), storage, stored)[0]
    assert values.tolist() == [*E2M1, *(-size for size in E2M1)] * 2
    assert torch.signbit(values).tolist() == ([False] * 8 + [True] * 8) * 2


def test_a_tile_may_begin_and_end_anywhere():
    shape = (3, 20, 64)
    storage, stored = drawn(shape, 16, "E4M3", "divide")
    lines = expected(storage, stored).view(60, 64)
    for start, end in itertools.combinations((0, 1, 19, 20, 21, 35, 40, 59, 60), 2):
        assert same(decoded(shape, storage, stored, Tile(shape, 60, start, end)), lines[start:end])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
def test_codes_may_be_stored_as_other_integers(dtype):
    storage, stored = drawn((24, 64), 32, "E8M0", "none")
    wanted = expected(storage, stored)
    stored["weight"] = stored["weight"].view(dtype)
    assert same(decoded((24, 64), storage, stored), wanted)


@pytest.mark.parametrize(("scale", "dtype"), [("E8M0", torch.float8_e8m0fnu), ("E4M3", torch.float8_e4m3fn)])
def test_scales_may_be_stored_as_floats(scale, dtype):
    storage, stored = drawn((24, 64), 32, scale, "none")
    wanted = expected(storage, stored)
    stored["scale"] = stored["scale"].view(dtype)
    assert same(decoded((24, 64), storage, stored), wanted)


def test_the_global_scale_is_the_same_for_every_tile():
    storage, stored = drawn((24, 64), 16, "E4M3", "multiply")
    stored["global"] = stored["global"].view(())
    assert same(decoded((24, 64), storage, stored), expected(storage, stored))
    found = {CODECS["fp4"].ranges(Tile((24, 64), 24, k, k + 1), storage)["global"] for k in range(24)}
    assert [one.ranges for one in found] == [((0, 4),)]


def test_dividing_and_multiplying_are_rounded_differently():
    """A global scale and its inverse are two storages: neither can stand for the other."""
    storage, stored = drawn((64, 64), 16, "E4M3", "divide")
    other = storage_of("fp4", "U8", **{"group": 16, "scale": "E4M3", "global": "multiply"})
    inverse = {**stored, "global": 1 / stored["global"]}
    one, two = decoded((64, 64), storage, stored), decoded((64, 64), other, inverse)
    assert torch.allclose(one, two)
    assert not torch.equal(one, two)


@pytest.mark.parametrize(("scale", "bad"), [("E8M0", 255), ("E4M3", 0x7F), ("E4M3", 0xFF)])
def test_a_scale_that_is_nan_makes_its_group_nan_and_no_other(scale, bad):
    storage, stored = drawn((8, 64), 32, scale, "none")
    stored["scale"][3, 1] = bad
    values = decoded((8, 64), storage, stored)
    assert values[3, 32:].isnan().all()
    assert int(values.isnan().sum()) == 32


@pytest.mark.parametrize("byte", [0, 1, 254])
def test_the_ends_of_the_range_of_powers_are_kept(byte):
    storage, stored = drawn((1, 32), 32, "E8M0", "none")
    stored["weight"].fill_(0x12)  # 1.0, 0.5
    stored["scale"].fill_(byte)
    assert decoded((1, 32), storage, stored)[0, :2].tolist() == [2.0 ** (byte - 127), 2.0 ** (byte - 128)]


# gpt-oss: the parameter is the transpose of what is stored

EXPERTS = [(1, 32, 1), (4, 64, 48), (3, 96, 200), (2, 320, 130)]


def experts(shape, seed=0):
    """Return random blocks and scales of a parameter ``[E, in, out]``."""
    random = torch.Generator().manual_seed(seed)
    n, n_in, n_out = shape
    return storage_of("mxfp4_experts", "U8"), {
        "weight": torch.randint(0, 256, (n, n_out, n_in // 32, 16), generator=random, dtype=torch.uint8),
        "scale": torch.randint(90, 150, (n, n_out, n_in // 32), generator=random, dtype=torch.uint8),
    }


def expected_of_experts(stored):
    blocks = meaning(nibbles(stored["weight"].numpy()))
    values = blocks * power(stored["scale"].numpy())[..., None]
    return torch.from_numpy(values.reshape(*values.shape[:2], -1).transpose(0, 2, 1).copy())


@pytest.mark.parametrize("shape", EXPERTS, ids=str)
def test_experts_are_turned_round(shape):
    storage, stored = experts(shape)
    assert same(decoded(shape, storage, stored), expected_of_experts(stored))
    assert is_same_in_tiles(shape, storage, stored)


def test_transformers_decodes_the_same_experts():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    shape = (4, 64, 48)
    storage, stored = experts(shape)
    wanted = convert_moe_packed_tensors(stored["weight"], stored["scale"], dtype=torch.bfloat16)
    assert torch.equal(decoded(shape, storage, stored).bfloat16(), wanted)


def test_experts_are_cut_where_a_group_begins_or_at_their_end():
    shape = (3, 96, 40)
    storage, stored = experts(shape)
    rows = expected_of_experts(stored).view(3 * 96, 40)
    assert CODECS["mxfp4_experts"].alignment(shape, 3 * 96, storage)[0] == 32
    assert CODECS["mxfp4_experts"].alignment(shape, 3, storage)[0] == 1
    for start, end in itertools.combinations(range(0, 3 * 96 + 1, 32), 2):
        assert same(decoded(shape, storage, stored, Tile(shape, 3 * 96, start, end)), rows[start:end])


def test_a_large_expert_is_turned_round_in_pieces(monkeypatch):
    monkeypatch.setattr("lora_merge.codecs.mxfp4_experts._PIECE", 32 * 40)
    storage, stored = experts((3, 96, 40))
    assert same(decoded((3, 96, 40), storage, stored), expected_of_experts(stored))


def test_all_tiles_of_one_expert_read_the_same_bytes():
    shape = (3, 96, 40)
    storage, _ = experts(shape)
    for expert in range(3):
        tiles = [Tile(shape, 3 * 96, expert * 96 + k, expert * 96 + k + 32) for k in (0, 32, 64)]
        found = [CODECS["mxfp4_experts"].ranges(tile, storage) for tile in tiles]
        assert found[0] == found[1] == found[2]
        assert found[0]["weight"].ranges == ((expert * 40 * 48, 40 * 48),)
        assert found[0]["scale"].ranges == ((expert * 40 * 3, 40 * 3),)

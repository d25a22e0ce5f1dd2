"""What every codec keeps, for each member of `CODECS`: exact widening, one rounding to the nearest, ties to even."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_merge.codecs import CODECS
from lora_merge.core.tensor import DTYPE_BITS, TORCH_NAMES

STORED = {"dense": tuple(TORCH_NAMES)}
each = pytest.mark.parametrize(
    ("codec", "dtype"), [(codec, dtype) for codec in CODECS for dtype in STORED[codec]]
)


def decode(codec, bits, dtype):
    """Return stored bit patterns as float32."""
    stored = torch.from_numpy(bits.view(np.uint8).copy()).view(getattr(torch, TORCH_NAMES[dtype])).view(1, -1)
    values = torch.empty(1, len(bits), dtype=torch.float32)
    CODECS[codec].decode(stored, values)
    return values.numpy()[0]


def encode(codec, values, dtype):
    """Return float32 values as stored bit patterns."""
    width = DTYPE_BITS[dtype] // 8
    out = torch.empty(1, len(values), dtype=getattr(torch, TORCH_NAMES[dtype]))
    CODECS[codec].encode(torch.from_numpy(values.copy()).view(1, -1), out)
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


@each
def test_every_stored_value_comes_back_as_it_was(codec, dtype):
    bits = every_pattern(dtype)
    values = decode(codec, bits, dtype)
    numbers = ~np.isnan(values)
    assert np.array_equal(encode(codec, values, dtype)[numbers], bits[numbers])
    again = decode(codec, encode(codec, values, dtype), dtype)
    assert np.isnan(again[~numbers]).all()
    assert (~numbers).sum() > 1


@each
def test_widening_is_exact(codec, dtype):
    bits = every_pattern(dtype)
    values = decode(codec, bits, dtype)
    if dtype == "F16":
        wanted = bits.view(np.float16).astype(np.float32)
    else:
        wanted = (bits.astype(np.uint32) << (32 - DTYPE_BITS[dtype])).view(np.float32)
    assert np.array_equal(values, wanted, equal_nan=True)


@each
def test_values_are_rounded_to_the_nearest_and_ties_to_even(codec, dtype):
    stored = decode(codec, every_pattern(dtype), dtype)
    numbers = np.unique(stored[np.isfinite(stored)])
    with np.errstate(over="ignore"):
        ties = ((numbers[:-1].astype(np.float64) + numbers[1:]) / 2).astype(np.float32)
        just_above, just_below = (
            np.nextafter(ties, np.float32(np.inf)),
            np.nextafter(ties, np.float32(-np.inf)),
        )
        drawn = np.random.default_rng(1).standard_normal(100_000).astype(np.float32)
        for values in (ties, just_above, just_below, drawn, drawn * np.float32(1e-6)):
            assert np.array_equal(encode(codec, values, dtype), rounded(values, dtype))


@each
def test_what_no_number_can_hold_becomes_infinite_and_nan_stays_nan(codec, dtype):
    beyond = np.array([np.inf, -np.inf, np.nan], dtype=np.float32)
    back = decode(codec, encode(codec, beyond, dtype), dtype)
    assert np.array_equal(back, beyond, equal_nan=True)
    if dtype != "F32":
        largest = np.array([3.4028235e38, -3.4028235e38], dtype=np.float32)
        assert np.isinf(decode(codec, encode(codec, largest, dtype), dtype)).all()


@each
def test_what_is_computed_where_it_is_stored_stays_as_it_is(codec, dtype):
    values = torch.arange(6, dtype=torch.float32).view(2, 3)
    CODECS[codec].decode(values, values)
    CODECS[codec].encode(values, values)
    assert values.flatten().tolist() == list(range(6))


@each
def test_minus_zero_keeps_its_sign(codec, dtype):
    zeros = np.array([0.0, -0.0], dtype=np.float32)
    assert np.signbit(decode(codec, encode(codec, zeros, dtype), dtype)).tolist() == [False, True]

"""Stochastic rounding: up or down at random, so that the mean of what is stored is the value.

Each draw is a hash of a seed, the tensor's key and the number of the element in the whole weight. So it does not depend on
tiles, workers, their order or the device.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

from lora_merge.codecs.lattice import PLAIN

if TYPE_CHECKING:
    import torch

    from lora_merge.codecs.grid import Grid

_AT_ONCE = 1 << 16
"""Values that are rounded at a time, so that what is computed in between stays in a processor's cache."""

_WORDS = 1 << 32

# Multipliers of "lowbias32", a mixing function of 32-bit words from Wellons' hash prospector.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B


def round_stochastic(
    values: torch.Tensor, grid: Grid, seed: int, key: str, first_element: int
) -> torch.Tensor:
    """Return the level below or above each value: above with the probability (value - below) / (above - below).

    Beyond the last level there is only that level.

    Args:
        values: what is to be stored, float32 ``[lines, in]``.
        grid: of these lines.
        seed: of the run.
        key: the tensor's name.
        first_element: number of the first value in the whole weight.

    Returns:
        The levels, float32 ``[lines, in]``, newly allocated.
    """
    import torch

    levels = grid.numbers(values).contiguous()
    flat = levels.view(-1)
    start = 0
    while start < len(flat):
        number = first_element + start
        # Keys are made of a number's upper bits, so a part ends where these change.
        part = flat[start : start + min(_AT_ONCE, _WORDS - number % _WORDS)]
        words = _drawn(number % _WORDS, len(part), _keys(seed, key, number // _WORDS), part.device)
        if grid.lattice == PLAIN["BF16"]:
            _round_to_bfloat16_(part, words)
        else:
            below, above = grid.lattice.neighbours(part)
            share = (part - below).div_(above - below)
            draws = _down(words, 8).float().mul_(2.0**-24)
            # Where there is no level above, the share is no number, and the comparison is false.
            torch.where(draws < share, above, below, out=part)
        start += len(part)
    return levels


def _round_to_bfloat16_(numbers: torch.Tensor, words: torch.Tensor) -> None:
    """Round as above, in place and in a tenth of the time: bfloat16 is the upper half of a float32. Something is carried into
    it with a probability of the lower half over 2^16.
    """
    is_nan = numbers.isnan()
    numbers.view(words.dtype).add_(words.bitwise_and_(0xFFFF)).bitwise_and_(-0x10000)
    # The carry of a NaN might make a number of it.
    numbers.masked_fill_(is_nan, float("nan"))


# Asked for every part of a tile.
@lru_cache
def _keys(seed: int, key: str, high: int) -> tuple[int, int]:
    """Return two 32-bit keys for the elements that have these upper bits in their number."""
    digest = blake2b(f"{seed}:{high}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _drawn(first: int, n: int, keys: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Return 32 random bits for each of ``n`` elements, int32.

    Args:
        first: the lower 32 bits of the first element's number; none of the others has other upper bits.
        n: of elements.
        keys: see `_keys`.
        device: of the result.
    """
    import torch

    # Integers of 32 bits are calculated modulo 2^32, whatever their sign.
    words = torch.arange(n, dtype=torch.int32, device=device).add_(_signed(first))
    for key in keys:
        words.bitwise_xor_(_signed(key))
        _stir_(words, 16).mul_(_FIRST)
        _stir_(words, 15).mul_(_signed(_SECOND))
    return words


def _stir_(words: torch.Tensor, bits: int) -> torch.Tensor:
    return words.bitwise_xor_(_down(words, bits))


def _down(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift down and fill with zeros; torch fills with the sign."""
    return words.bitwise_right_shift(bits).bitwise_and_((1 << (32 - bits)) - 1)


def _signed(word: int) -> int:
    return word - _WORDS if word >= _WORDS // 2 else word

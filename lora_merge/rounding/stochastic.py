"""Stochastic rounding: up or down at random, so that the mean of what is stored is the value.

Each draw is a hash of a seed, the tensor's key and the number of the element in the whole weight. So it does not depend on
tiles, workers, their order or the device.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lora_merge.codecs.grid import Grid

_AT_ONCE = 1 << 18
"""Values that are rounded at a time, so that what is computed in between stays small."""

_LOW = 0xFFFFFFFF


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
    keys = _keys(seed, key)
    flat = levels.view(-1)
    for start in range(0, len(flat), _AT_ONCE):
        part = flat[start : start + _AT_ONCE]
        below, above = grid.lattice.neighbours(part)
        share = (part - below).div_(above - below)
        draws = _uniform(first_element + start, len(part), keys, part.device)
        # Where there is no level above, the share is no number, and the comparison is false.
        torch.where(draws < share, above, below, out=part)
    return levels


def _keys(seed: int, key: str) -> tuple[int, int]:
    digest = blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _uniform(first: int, n: int, keys: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Return a number from 0 to 1 (exclusive) for each of ``n`` elements, float32: a multiple of 2^-24."""
    import torch

    number = torch.arange(first, first + n, dtype=torch.int64, device=device)
    mixed = _mix((number & _LOW) ^ keys[0])
    mixed = _mix(mixed ^ (number >> 32) ^ keys[1])
    return (mixed >> 8).float().mul_(2.0**-24)


def _mix(word: torch.Tensor) -> torch.Tensor:
    """Mix 32-bit words, kept in int64: the finaliser "lowbias32" of Wellons' hash prospector. A product has at most 63 bits
    that matter, and what overflows is cut off.
    """
    word = word ^ (word >> 16)
    word = (word * 0x7FEB352D) & _LOW
    word = word ^ (word >> 15)
    word = (word * 0x846CA68B) & _LOW
    return word ^ (word >> 16)

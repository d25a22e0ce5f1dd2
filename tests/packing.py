"""Stored parts for tests of codecs of integers: a slow packer of codes into words, and tiles as small as a codec allows."""

from __future__ import annotations

import math

import torch

from lora_merge.codecs import CODECS
from lora_merge.core.weight import Tile
from tests.decoding import decoded, same, views_of


def drawn(*shape, below, seed=0):
    """Return random integers, 0 and the largest among them where there is room."""
    codes = torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))
    codes.view(-1)[0], codes.view(-1)[-1] = 0, below - 1
    return codes


def scales(*shape, dtype=torch.bfloat16, seed=1):
    """Return random scales of either sign."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def packed(codes, bits):
    """Return codes ``[…, n]`` as int32 ``[…, ⌈n · bits / 32⌉]``: each line is one large integer, stored little-endian."""
    n_words = math.ceil(codes.shape[-1] * bits / 32)
    lines = bytearray()
    for line in codes.reshape(-1, codes.shape[-1]).tolist():
        lines += sum(code << k * bits for k, code in enumerate(line)).to_bytes(n_words * 4, "little")
    return torch.frombuffer(lines, dtype=torch.int32).view(*codes.shape[:-1], n_words)


def spread(grid, group, width):
    """Return a value per group ``[…, groups]`` as a value per column ``[…, width]``."""
    return grid[..., torch.arange(width) // (group or width)]


def small_tiles(one, shape, view, units):
    """Return tiles of some units of the alignment each, never across two matrices."""
    multiple, _ = CODECS[one.codec].alignment(shape, view.n_rows, one)
    return [
        Tile(shape, view.n_rows, before + start, before + min(start + units * multiple, view.rows))
        for before in range(0, view.n_rows, view.rows)
        for start in range(0, view.rows, units * multiple)
    ]


def agree(one, parts, shape, wanted):
    """Return True where a weight has some values, bit for bit, as a whole and in tiles as small as its codec allows."""
    return same(decoded(shape, one, parts), wanted) and all(
        same(
            torch.cat([decoded(shape, one, parts, tile) for tile in small_tiles(one, shape, view, units)]),
            rows,
        )
        for view in views_of(shape)
        for rows in [wanted.reshape(view.n_rows, -1)]
        for units in (1, 3)
    )

"""Stored parts for tests of codecs: a slow packer of codes into words, and a reader that gives a codec its tiles."""

from __future__ import annotations

import math

import torch

from lora_merge.codecs import CODECS
from lora_merge.core.tensor import STORED_TYPES
from lora_merge.core.weight import Storage, Tile


def storage(codec, dtype, **settings):
    return Storage(codec, dtype, tuple(sorted(settings.items())))


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


def decoded(one, parts, tiles):
    """Return the values of some tiles, one below the other. The codec gets copies of the bytes that it asks for."""
    codec, found = CODECS[one.codec], []
    for tile in tiles:
        given = {}
        for role, wanted in codec.ranges(tile, one).items():
            raw = parts[role].contiguous().view(-1).view(torch.uint8)
            assert all(first >= 0 and first + n <= len(raw) for first, n in wanted.ranges), role
            share = torch.cat([raw[first : first + n] for first, n in wanted.ranges])
            given[role] = share.view(getattr(torch, STORED_TYPES[wanted.dtype])).view(wanted.shape)
        columns = math.prod(tile.shape) // tile.n_rows
        found.append(torch.full((tile.end - tile.start, columns), float("nan")))
        codec.decode(tile, given, found[-1], one)
    return torch.cat(found)


def tiles_of(one, shape, n_rows, units=None):
    """Return tiles of some units of the alignment each, never across two matrices; of everything where ``units`` is None."""
    multiple, _ = CODECS[one.codec].alignment(shape, n_rows, one)
    if units is None:
        return [Tile(shape, n_rows, 0, n_rows)]
    matrix = shape[1] if len(shape) == 3 and n_rows == shape[0] * shape[1] else n_rows
    return [
        Tile(shape, n_rows, before + start, before + min(start + units * multiple, matrix))
        for before in range(0, n_rows, matrix)
        for start in range(0, matrix, units * multiple)
    ]


def agree(one, parts, shape, wanted):
    """Assert that a weight is decoded to some values, bit for bit, in tiles of any size and either division into rows."""
    assert wanted.dtype == torch.float32
    for n_rows in {shape[0], math.prod(shape[:-1])}:
        for units in (None, 1, 2, 3):
            values = decoded(one, parts, tiles_of(one, shape, n_rows, units)).view(shape)
            assert torch.equal(values, wanted), (n_rows, units)

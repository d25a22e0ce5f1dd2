"""bitsandbytes' NF4 and FP4: blocks over the flattened weight, scales that may be quantised themselves."""

from __future__ import annotations

import math

import pytest
import torch

from lora_merge.codecs import CODECS
from lora_merge.core.weight import Tile
from tests.decoding import decoded, storage_of
from tests.packing import agree, drawn

OFFSET = 0.04217529296875


def bnb4(shape, block, nested=0):
    """Return the storage, the parts and the values of a 4-bit weight, each value looked up alone."""
    n = math.prod(shape)
    n_blocks = -(-n // block)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(16, generator=generator)
    codes = drawn(n, below=16).tolist()
    packed = bytes(16 * a + b for a, b in zip(codes[0::2], [*codes[1::2], 0], strict=False))
    parts = {"weight": torch.tensor(list(packed), dtype=torch.uint8).view(-1, 1), "table": table}
    absmax = torch.rand(n_blocks, generator=generator)
    if nested:
        stored, inner = drawn(n_blocks, below=256), torch.rand(-(-n_blocks // nested), generator=generator)
        outer = torch.randn(256, generator=generator)
        absmax = torch.stack([outer[q] * inner[k // nested] + OFFSET for k, q in enumerate(stored.tolist())])
        parts |= {"absmax": stored.to(torch.uint8), "nested_absmax": inner, "nested_table": outer}
    else:
        parts["absmax"] = absmax
    values = [table[code] * absmax[k // block] for k, code in enumerate(codes)]
    one = storage_of("bnb4", "U8", block=block, nested=nested, offset=OFFSET if nested else 0.0)
    return one, parts, torch.stack(values).view(shape)


@pytest.mark.parametrize("shape", [(1, 1), (2, 64), (7, 96), (33, 100), (40, 31), (129, 16), (3, 5, 20)])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("nested", [0, 4])
def test_blocks_of_the_flattened_weight(shape, block, nested):
    one, parts, wanted = bnb4(shape, block, nested)
    assert agree(one, parts, shape, wanted)


def test_quantised_scales_with_blocks_of_256():
    shape = (520, 40)  # 325 blocks, so that the second nested block is cut off
    one, parts, wanted = bnb4(shape, 64, 256)
    assert parts["nested_absmax"].shape == (2,)
    assert agree(one, parts, shape, wanted)
    for limits in ((0, 8), (408, 416), (416, 520), (512, 520)):
        assert torch.equal(decoded(shape, one, parts, Tile(shape, 520, *limits)), wanted[slice(*limits)])


def test_a_tile_reads_only_its_blocks():
    one, _, _ = bnb4((64, 96), 64, 4)
    found = CODECS["bnb4"].ranges(Tile((64, 96), 64, 8, 14), one)
    assert {role: wanted.ranges for role, wanted in found.items()} == {
        "weight": ((384, 288),),
        "table": ((0, 64),),
        "absmax": ((12, 9),),
        "nested_absmax": ((12, 12),),
        "nested_table": ((0, 1024),),
    }


@pytest.mark.parametrize(
    ("columns", "block", "rows"),
    [(64, 64, 1), (96, 64, 2), (100, 64, 16), (31, 64, 64), (4096, 64, 1), (96, 128, 4)],
)
def test_tiles_begin_where_a_block_does(columns, block, rows):
    one = storage_of("bnb4", "U8", block=block, nested=0, offset=0.0)
    assert CODECS["bnb4"].alignment((128, columns), 128, one) == (rows, 1)


def test_the_high_half_of_a_byte_comes_first():
    parts = {
        "weight": torch.tensor([0x1F, 0x20], dtype=torch.uint8),
        "table": torch.arange(16, dtype=torch.float32),
        "absmax": torch.tensor([2.0]),
    }
    one = storage_of("bnb4", "U8", block=64, nested=0, offset=0.0)
    assert decoded((1, 4), one, parts, Tile((1, 4), 1, 0, 1)).tolist() == [[2.0, 30.0, 4.0, 0.0]]


def test_codes_may_be_stored_under_another_dtype():
    one, parts, wanted = bnb4((16, 64), 64)
    assert agree(one, {**parts, "weight": parts["weight"].view(-1).view(torch.bfloat16)}, (16, 64), wanted)

"""ModelOpt's W4A16_AWQ: two rows share a byte, and a scale for each column may be left over."""

from __future__ import annotations

import pytest
import torch

from lora_merge.codecs import CODECS
from lora_merge.core.weight import Tile
from tests.decoding import decoded, storage_of
from tests.packing import agree, drawn, scales, spread


def modelopt_awq(shape, group, pre=""):
    """Return the storage, the parts and the values of a weight of signed 4-bit codes."""
    n_out, n_in = shape
    codes = drawn(*shape, below=16) - 8
    nibbles = torch.nn.functional.pad(codes % 16, (0, 0, 0, n_out % 2))
    packed = (nibbles[0::2] | nibbles[1::2] << 4).to(torch.uint8)
    scale = scales(n_out, -(-n_in // (group or n_in)), dtype=torch.float32)
    wanted = codes.float() * spread(scale, group, n_in)
    parts = {"weight": packed, "scale": scale}
    if pre:
        parts["pre_quant_scale"] = scales(n_in, seed=4)
        wanted = wanted * parts["pre_quant_scale"].float()
    return storage_of("modelopt_awq", "U8", group=group, scale="F32", pre=pre), parts, wanted


@pytest.mark.parametrize("shape", [(2, 1), (10, 7), (72, 100), (96, 128), (9, 64)])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("pre", ["", "BF16"])
def test_rows_that_share_a_byte(shape, group, pre):
    one, parts, wanted = modelopt_awq(shape, group, pre)
    assert CODECS["modelopt_awq"].alignment(shape, shape[0], one) == (2, 1)
    assert agree(one, parts, shape, wanted)


def test_the_low_half_is_the_even_row_and_codes_have_a_sign():
    parts = {"weight": torch.tensor([[0x87, 0xF0]], dtype=torch.uint8), "scale": torch.ones(2, 1)}
    one = storage_of("modelopt_awq", "U8", group=0, scale="F32", pre="")
    assert decoded((2, 2), one, parts, Tile((2, 2), 2, 0, 2)).tolist() == [[7.0, 0.0], [-8.0, -1.0]]

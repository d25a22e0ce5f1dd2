"""Blocks that run over the flattened weight, across its rows: bitsandbytes' NF4 and FP4."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from lora_merge.checks.decoding.decoder import Levels, StoredRows, setting
from lora_merge.checks.decoding.raw import distinct
from lora_merge.core.weight import WEIGHT

if TYPE_CHECKING:
    import torch


def bnb4(stored: StoredRows) -> Levels:
    """Return ``table[c] · absmax[k // block]`` for number k of the flattened weight; bitsandbytes 0.50 ``dequantize_4bit``."""
    return Levels.joined([_row(stored, row) for row in stored.rows])


def _row(stored: StoredRows, row: int) -> Levels:
    import torch

    columns, block = prod(stored.weight.shape) // stored.n_rows, setting(stored, "block")
    first, last = row * columns, (row + 1) * columns
    n_bytes = stored.weight.parts[WEIGHT].nbytes
    content = stored.part(WEIGHT, range(first // 2, -(-last // 2)), n_bytes).content.flatten()
    # The high half of a byte is the first. A row may begin in the middle of one.
    codes = torch.stack((content >> 4, content & 15), 1).flatten()[first % 2 :][:columns]
    blocks = torch.arange(first, last) // block
    absmax = _absmax(stored, int(blocks[0]), int(blocks[-1]) + 1)
    meanings = stored.whole("table")
    return Levels(meanings[codes.long()][None], distinct(meanings), absmax[blocks - blocks[0]][None])


def _absmax(stored: StoredRows, first: int, last: int) -> torch.Tensor:
    """Return the scales of some blocks, float64."""
    import torch

    nested = setting(stored, "nested")
    count = -(-prod(stored.weight.shape) // setting(stored, "block"))
    raw = stored.part("absmax", range(first, last), count)
    if not nested:
        return raw.floats().flatten()
    outer = torch.arange(first, last) // nested
    scale = stored.part("nested_absmax", range(int(outer[0]), int(outer[-1]) + 1), -(-count // nested))
    # In float32, since the library stops there.
    values = stored.whole("nested_table").float()[raw.content.flatten().long()]
    offset = torch.tensor(float(dict(stored.weight.storage.settings)["offset"]), dtype=torch.float32)
    return (values * scale.floats().flatten().float()[outer - outer[0]] + offset).double()

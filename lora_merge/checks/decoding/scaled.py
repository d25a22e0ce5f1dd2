"""Codes of eight bits, each times the scale of its block: FP8, INT8, MXFP8, LLM.int8."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.checks.decoding.decoder import Levels, Lines, StoredRows, gathered, integers, setting, text
from lora_merge.checks.decoding.raw import table_of
from lora_merge.core.weight import WEIGHT

if TYPE_CHECKING:
    import torch

_POWERS = "F8_E8M0"

_ONE_127TH = 7.874015718698502e-3
"""1/127 as float32 has it: bitsandbytes multiplies by that (``MM_DEQUANT_CONSTANT``)."""


def scaled(stored: StoredRows) -> Levels:
    """Return ``q[i, j] · s[i // block_rows, j // block_columns]``. A block of zero rows or columns is a whole axis."""
    lines = Lines.of(stored)
    height, width = (
        setting(stored, "block_rows") or lines.height,
        setting(stored, "block_columns") or lines.width,
    )
    high = -(-lines.height // height)
    codes = text(stored, "codes")
    # Each matrix of a stack has a grid, and the last block of an axis may be cut off.
    wanted = [n // lines.height * high + n % lines.height // height for n in lines.numbers]
    raw, places = gathered(stored, "scale", wanted, lines.n_matrices * high)
    scale = raw.floats(_POWERS)[places].repeat_interleave(width, 1)[:, : lines.width]
    table = integers(-128, 127) if codes == "I8" else table_of(codes)
    return Levels(_codes(stored, lines, codes), table, scale).split(lines, stored)


def _codes(stored: StoredRows, lines: Lines, dtype: str) -> torch.Tensor:
    import torch

    raw = stored.part(WEIGHT, lines.numbers, lines.count)
    return raw.content.view(torch.int8).double() if dtype == "I8" else raw.floats(dtype)


def llm_int8(stored: StoredRows) -> Levels:
    """Return ``q[i, j] · SCB[i] / 127``; bitsandbytes 0.50 ``int8_vectorwise_dequant``. It makes no code of
    -128.
    """
    lines = Lines.of(stored)
    scale = stored.part("scale", lines.numbers, lines.count).floats()
    codes = _codes(stored, lines, "I8")
    return Levels(codes, integers(-127, 127), scale * _ONE_127TH).split(lines, stored)

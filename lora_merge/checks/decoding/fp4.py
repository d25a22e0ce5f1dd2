"""Codes of four bits, floats with two bits of exponent and one of fraction: MXFP4 and NVFP4."""

from __future__ import annotations

from itertools import groupby
from math import nan

from lora_merge.checks.decoding.decoder import Levels, Lines, StoredRows, setting, text
from lora_merge.checks.decoding.raw import e2m1, e2m1_codes, looked_up
from lora_merge.core.weight import WEIGHT

_MX_GROUP = 32
_DTYPES = {"E8M0": "F8_E8M0", "E4M3": "F8_E4M3"}


def fp4(stored: StoredRows) -> Levels:
    """Return ``e2m1 · s``, ``e2m1 · (s / global)`` or ``e2m1 · (s · global)``, whichever the storage says."""
    import torch

    lines = Lines.of(stored)
    codes = stored.part(WEIGHT, lines.numbers, lines.count).nibbles()
    scale = stored.part("scale", lines.numbers, lines.count).floats(_DTYPES[text(stored, "scale")])
    how = text(stored, "global")
    if how != "none":
        # Divided by infinity, every value would be zero.
        shared = stored.whole("global")
        shared = shared.masked_fill(shared.isinf(), nan)
        # One for the weight, or one for each matrix of a stack.
        if len(shared) > 1:
            shared = shared[torch.tensor([n // lines.height for n in lines.numbers])].view(-1, 1)
        scale = scale / shared if how == "divide" else scale * shared
    scale = scale.repeat_interleave(setting(stored, "group"), 1)
    return Levels(looked_up(e2m1_codes(), codes), e2m1(), scale).split(lines, stored)


def mxfp4_experts(stored: StoredRows) -> Levels:
    """Return ``e2m1 · s`` of experts that are stored as the transpose of what the model has.

    Shapes:
        the weight: ``[E, in, out]``; its blocks: ``[E, out, in / 32, 16]``; its scales: ``[E, out, in / 32]``.
    """
    import torch

    lines = Lines.of(stored)
    n_out = lines.width
    found = []
    for expert, own in groupby(lines.numbers, lambda n: n // lines.height):
        inputs = torch.tensor([n % lines.height for n in own])
        first, last = int(inputs.min()) // _MX_GROUP, int(inputs.max()) // _MX_GROUP + 1
        outputs, count = range(expert * n_out, (expert + 1) * n_out), lines.n_matrices * n_out
        # All outputs of the expert, and of each the groups that have some of the inputs: 16 bytes a group.
        blocks = stored.part(WEIGHT, outputs, count, (16 * first, 16 * last))
        scales = stored.part("scale", outputs, count, (first, last)).floats("F8_E8M0")
        inside = inputs - _MX_GROUP * first
        codes = blocks.content[:, inside // 2].long() >> 4 * (inside % 2) & 15
        found.append(Levels(looked_up(e2m1_codes(), codes).T, e2m1(), scales[:, inside // _MX_GROUP].T))
    return Levels.joined(found).split(lines, stored)

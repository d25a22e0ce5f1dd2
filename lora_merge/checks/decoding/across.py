"""Storages whose rows lie across those of the weight: GPTQ and AWQ store ``[in, out]``, several values in a word."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.checks.decoding.decoder import Levels, StoredRows, integers, setting
from lora_merge.checks.decoding.raw import Raw
from lora_merge.core.tensor import DTYPE_BITS
from lora_merge.core.weight import WEIGHT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

_NEAR = 1024
"""Outputs no further apart than this are read together: it takes no longer than to read each alone."""

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Output k of eight is at four times this bit of the word."""


def gptq(stored: StoredRows) -> Levels:
    """Return ``(q[j, i] - z[g(j), i]) · s[g(j), i]``, transposed: ``[out, in]``. GPTQ, versions 1 and 2."""
    return _by_neighbours(stored, _gptq)


def awq(stored: StoredRows) -> Levels:
    """Return ``(q[j, i] - z[j // group, i]) · s[j // group, i]``, transposed: ``[out, in]``. AutoAWQ's ``gemm``."""
    return _by_neighbours(stored, _awq)


def _by_neighbours(stored: StoredRows, decode: Callable[[StoredRows, Sequence[int]], Levels]) -> Levels:
    """Return the rows, decoded in groups of neighbours."""
    found: list[list[int]] = []
    for row in stored.rows:
        if found and 0 <= row - found[-1][-1] <= _NEAR:
            found[-1].append(row)
        else:
            found.append([row])
    return Levels.joined([decode(stored, rows) for rows in found])


def _gptq(stored: StoredRows, rows: Sequence[int]) -> Levels:
    n_in, bits, n_groups = stored.weight.shape[1], setting(stored, "bits"), setting(stored, "groups")
    # Numbers are packed along the inputs: down the columns of words.
    words = _columns(stored, WEIGHT, rows, -(-n_in * bits // 32), 4)
    codes = Raw(words.transpose(0, 1).flatten(1), "I32").fields(bits)[:, :n_in]
    scale = _floats(stored, rows, n_groups)
    zero = _gptq_zeros(stored, rows, bits, n_groups)
    groups = stored.part("g_idx", [0], 1).integers()[0]
    return Levels(codes.double(), integers(0, (1 << bits) - 1), scale[:, groups], zero[:, groups].double())


def _gptq_zeros(stored: StoredRows, rows: Sequence[int], bits: int, n_groups: int) -> torch.Tensor:
    """Return the zero points of some outputs, int64 ``[rows, groups]``.

    They are packed along the outputs. Version 1 stores one less.
    """
    import torch

    # Three words hold 32 numbers of three bits: the first word that is read starts at the first bit of a number.
    unit = 3 if bits == 3 else 1
    first, last = rows[0] * bits // 32 // unit * unit, (rows[-1] * bits + bits - 1) // 32 + 1
    raw = stored.part("zero", range(n_groups), n_groups, (4 * first, 4 * last))
    is_less = setting(stored, "version") == 1
    if is_less and bits != 3:
        # GPTQModel subtracts 1 from all fields of a word at once, so one may have borrowed from the next: the same word
        # is added here.
        words = raw.words() + sum(1 << bit for bit in range(0, 32, bits)) & 0xFFFFFFFF
        halves = words - (words >> 31 << 32)  # as signed words
        raw = Raw(halves.int().view(torch.uint8).view(n_groups, -1), "I32")
    fields = raw.fields(bits)
    if is_less and bits == 3:
        # These fields cross words, and each was changed alone.
        fields = fields + 1 & 7
    return fields[:, torch.tensor(rows) - first * 32 // bits].T


def _awq(stored: StoredRows, rows: Sequence[int]) -> Levels:
    import torch

    n_in = stored.weight.shape[1]
    size = setting(stored, "group") or n_in
    n_groups = -(-n_in // size)
    groups = torch.arange(n_in) // size
    codes = _awq_numbers(stored, WEIGHT, rows, n_in)
    zero = _awq_numbers(stored, "zero", rows, n_groups)
    scale = _floats(stored, rows, n_groups)
    return Levels(codes.double(), integers(0, 15), scale[:, groups], zero[:, groups].double())


def _awq_numbers(stored: StoredRows, role: str, rows: Sequence[int], height: int) -> torch.Tensor:
    """Return numbers of four bits for some outputs, int64 ``[rows, height]``."""
    import torch

    words = Raw(_columns(stored, role, [row // 8 for row in rows], height, 4).flatten(1), "I32").words()
    shifts = torch.tensor([4 * _AWQ_ORDER[row % 8] for row in rows])
    return (words >> shifts & 15).T


def _floats(stored: StoredRows, rows: Sequence[int], n_groups: int) -> torch.Tensor:
    """Return the scales of some outputs, float64 ``[rows, groups]``."""
    dtype = str(dict(stored.weight.storage.settings)["scale"])
    content = _columns(stored, "scale", rows, n_groups, DTYPE_BITS[dtype] // 8)
    return Raw(content.flatten(1), dtype).floats().T


def _columns(
    stored: StoredRows, role: str, columns: Sequence[int], height: int, n_bytes: int
) -> torch.Tensor:
    """Return some columns of a part, in ascending order, as bytes: uint8 ``[height, columns, bytes of an entry]``."""
    import torch

    first, last = columns[0], columns[-1] + 1
    raw = stored.part(role, range(height), height, (first * n_bytes, last * n_bytes))
    return raw.content.view(height, -1, n_bytes)[:, torch.tensor(columns) - first]

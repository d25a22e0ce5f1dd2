"""Decoding by compiled code (`lora_merge.native`), with the bits that torch gives."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lora_merge.native.library import Coded, library

if TYPE_CHECKING:
    import numpy as np
    import torch

    Codes = np.ndarray[Any, Any]
    Numbers = np.ndarray[Any, np.dtype[np.float32]]

_BITS = {16: 4, 256: 8}
"""Entries of a table → bits of its codes. Others are not decoded here."""


def decode(
    codes: torch.Tensor,
    table: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    *,
    group: int,
    zero: torch.Tensor | None = None,
    is_e4m3: bool = False,
) -> bool:
    """Write ``(table[code] - zero) · scale``, if there is compiled code for it. Return whether it is done.

    Args:
        codes: lines of bytes or words; of four bits, the low ones of each byte first.
        table: float32, what each code stands for before the scale: ``[16]`` for codes of four bits, ``[256]`` of eight.
        scale: float32 ``[lines, groups]``, or ``[1, groups]`` where all lines share it.
        out: float32 ``[lines, in]``.
        group: adjacent values of a group, the last of a line may be cut off; 0 for the whole line.
        zero: float32 ``[lines, groups]``; None for 0.
        is_e4m3: the table is that of ``"F8_E4M3"``, for which there is a quicker way.
    """
    found = library()
    if found is None or not out.is_contiguous() or not _is_float32(out):
        return False
    parts = [table, scale] if zero is None else [table, scale, zero]
    if not codes.is_cpu or not all(map(_is_float32, parts)):
        return False
    coded = coded_of(
        codes.numpy(),
        table.numpy(),
        scale.numpy(),
        (len(out), out.shape[1]),
        group=group,
        zero=None if zero is None else zero.numpy(),
        is_e4m3=is_e4m3,
    )
    if coded is None:
        return False
    coded.values, coded.stride = out.data_ptr(), out.shape[1]
    found.decode(coded)
    return True


def _is_float32(part: torch.Tensor) -> bool:
    import torch

    return part.dtype == torch.float32 and part.is_cpu


def coded_of(
    codes: Codes,
    table: Numbers,
    scale: Numbers,
    shape: tuple[int, int],
    *,
    group: int,
    zero: Numbers | None = None,
    is_e4m3: bool = False,
) -> Coded | None:
    """Return what compiled code has to know of codes to decode them, as `decode` takes it; None where it cannot. It has the addresses of
    the arrays, and does not keep them.

    Args:
        codes: as there; table: as there; scale: as there, or one line that is expanded.
        shape: lines, and values of each.
        group: as there; zero: as there; is_e4m3: as there.
    """
    lines, width = shape
    bits = _BITS.get(len(table))
    if bits is None or not lines * width or (bits == 4 and group % 2):
        return None
    parts = [scale] if zero is None else [scale, zero]
    if any(part.shape[1] > 1 and part.strides[1] != part.itemsize for part in parts):
        return None
    if not codes.flags.c_contiguous or codes.shape[0] != lines:
        return None
    stride = codes.strides[0] if lines > 1 else codes.nbytes
    if stride * 8 < width * bits:
        return None
    return Coded(
        n_lines=lines,
        n_columns=width,
        codes=codes.ctypes.data,
        code_stride=stride,
        bits=bits,
        table=table.ctypes.data,
        scale=scale.ctypes.data,
        scale_stride=stride_of(scale),
        zero=None if zero is None else zero.ctypes.data,
        zero_stride=0 if zero is None else stride_of(zero),
        group=group or width,
        is_e4m3=is_e4m3,
    )


def stride_of(part: Numbers) -> int:
    """Return the distance of two lines, in numbers; 0 where all share one."""
    return part.strides[0] // part.itemsize if len(part) > 1 else 0


@lru_cache
def whole_numbers(bits: int, offset: int) -> torch.Tensor:
    """Return ``code - offset`` of each code, float32 ``[2^bits]``."""
    import torch

    return torch.arange(1 << bits, dtype=torch.float32).sub_(offset)


@lru_cache
def one() -> torch.Tensor:
    """Return the scale of codes that have none: float32 ``[1, 1]``."""
    import torch

    return torch.ones(1, 1)


@lru_cache
def signed_bytes() -> torch.Tensor:
    """Return what each byte is as an int8: float32 ``[256]``."""
    import torch

    return torch.arange(256, dtype=torch.uint8).view(torch.int8).float()

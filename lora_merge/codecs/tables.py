"""What each code of eight bits, and each pair of codes of four, stands for. Looking a value up is faster than casting it."""

from __future__ import annotations

from functools import lru_cache
from math import nan
from typing import TYPE_CHECKING

from lora_merge.codecs.compiled import decode, one

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

_FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}

_EXPONENTS = {"F8_E8M0", "U8"}
"""Codes that are a power of two, 2^(code - 127). Scales of MX formats are stored as plain bytes, too."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

_PIECE = 1 << 19
"""Codes or levels that are converted at once: those of a usual tile."""

E2M1_SIGNS = 0x88
"""The sign bits of the two codes in a byte."""

_E4M3_NAN = 0x7F
"""The code of NaN, without its sign."""


# Two threads may make a table at once: they make the same one.
@lru_cache
def values_of_codes(dtype: str, device: torch.device) -> torch.Tensor:
    """Return what each byte means: float32 ``[256]``.

    Args:
        dtype: ``"F8_E4M3"``, ``"F8_E5M2"`` (with their NaN and infinities), or ``"F8_E8M0"``, also spelled ``"U8"``:
            powers of two, 255 is NaN (OCP Microscaling Formats 1.0).
        device: where the table is wanted.
    """
    import torch

    if dtype in _EXPONENTS:
        return torch.tensor([*(2.0 ** (code - 127) for code in range(255)), nan], device=device)
    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, _FLOAT8[dtype]))
    return codes.to(torch.float32).to(device)


@lru_cache
def values_of_e2m1() -> torch.Tensor:
    """Return what each E2M1 code means: float32 ``[16]``, on the CPU."""
    import torch

    return torch.tensor(_E2M1)


@lru_cache
def pairs_of_e2m1(device: torch.device) -> torch.Tensor:
    """Return the two E2M1 values of each byte, the low nibble's first: two float32 in one int64, ``[256]``."""
    import torch

    values, codes = values_of_e2m1(), torch.arange(256)
    pairs = torch.stack((values[codes & 15], values[codes >> 4]), 1)
    # A pair is copied as one number of 64 bits: twice as fast as one value at a time.
    return pairs.view(torch.int64).view(-1).to(device)


def look_up(codes: torch.Tensor, dtype: str, out: torch.Tensor) -> None:
    """Write what codes mean.

    Args:
        codes: U8; any shape.
        dtype: of `values_of_codes`.
        out: float32, contiguous, as many.
    """
    import torch

    if out.numel():
        table, is_e4m3 = values_of_codes(dtype, out.device), dtype == "F8_E4M3"
        if decode(codes.reshape(1, -1), table, one(), out.view(1, -1), group=0, is_e4m3=is_e4m3):
            return
    for part, values in in_pieces(codes, out):
        if dtype == "F8_E4M3" and out.device.type == "cpu" and not _has_nan(part):
            _widen_e4m3(part, values)
        else:
            # Of the index types int32 is the faster, and its conversion costs a tenth of the look-up.
            torch.index_select(values_of_codes(dtype, out.device), 0, part.int(), out=values)


def _has_nan(codes: torch.Tensor) -> bool:
    """Return True where one of some E4M3 codes is NaN."""
    return codes.numel() > 0 and int(codes.bitwise_and(_E4M3_NAN).amax()) == _E4M3_NAN


def _widen_e4m3(codes: torch.Tensor, out: torch.Tensor) -> None:
    """Write what E4M3 codes mean that are not NaN, in half of the time of a look-up: a float16 has the same bits behind its
    first exponent bit, and so is 2^8 times smaller.
    """
    import torch

    halves = codes.view(torch.int8).to(torch.int16)
    # The sign has filled all upper bits.
    halves.bitwise_left_shift_(7).bitwise_and_(~0x4000)
    out.copy_(halves.view(torch.float16)).mul_(2.0**8)


def look_up_e2m1(codes: torch.Tensor, out: torch.Tensor) -> None:
    """Write what pairs of E2M1 codes mean.

    Args:
        codes: U8, two codes in each byte, the low nibble first; any shape.
        out: float32, contiguous, twice as many; its memory begins at a multiple of eight bytes.
    """
    import torch

    table = pairs_of_e2m1(out.device)
    for part, pairs in in_pieces(codes, out.view(-1).view(torch.int64)):
        torch.index_select(table, 0, part.int(), out=pairs)


def pack_bytes(levels: torch.Tensor, dtype: str, out: torch.Tensor) -> None:
    """Write the codes of levels, the inverse of `look_up`.

    Args:
        levels: float32, each exact in the dtype; any shape.
        dtype: ``"F8_E4M3"``, ``"F8_E5M2"`` or ``"I8"``.
        out: U8, or I8 of integers, in the same shape.
    """
    import torch

    if dtype == "I8":
        out.copy_(levels)
    else:
        out.view(getattr(torch, _FLOAT8[dtype])).copy_(levels)


def pack_e2m1_(levels: torch.Tensor, out: torch.Tensor) -> None:
    """Write the codes of E2M1 levels, the inverse of `look_up_e2m1`. The sign of a zero is kept.

    Args:
        levels: float32, in the order of the codes; they are changed.
        out: U8, half as many.
    """
    import torch

    if not (levels.is_contiguous() and out.is_contiguous()):
        _pack_e2m1_(levels.reshape(-1), out)
        return
    for part, codes in zip(
        torch.split(levels.view(-1), _PIECE), torch.split(out.view(-1), _PIECE // 2), strict=True
    ):
        _pack_e2m1_(part, codes)


def _pack_e2m1_(levels: torch.Tensor, out: torch.Tensor) -> None:
    import torch

    # Float16 has 14 exponents below E2M1's smallest. So much smaller, levels have the exponents of their codes, and 0.5 is
    # subnormal in both.
    codes = levels.mul_(2.0**-14).to(torch.float16).view(torch.int32)
    other = codes.bitwise_right_shift(12).bitwise_and_(0x00080008)
    codes.bitwise_right_shift_(9).bitwise_and_(0x00070007).bitwise_or_(other)
    # The code of the upper half goes beside that of the lower one.
    torch.bitwise_right_shift(codes, 12, out=other)
    out.copy_(codes.bitwise_or_(other).view(out.shape))


def keep_signs_of_zeros_(codes: torch.Tensor, stored: torch.Tensor, sign: int) -> None:
    """Give each zero that was stored as a zero its old sign. All other codes stay as they are.

    Args:
        codes: U8, any shape; they are changed.
        stored: those before, in the same shape.
        sign: the sign bit of each code in a byte: 0x80 for codes of eight bits, 0x88 for two of four.
    """
    size = 0xFF ^ sign
    pieces = (
        in_pieces(stored, codes) if codes.is_contiguous() and stored.is_contiguous() else [(stored, codes)]
    )
    for before, part in pieces:
        # The sum reaches a sign bit where one of the two is not zero. On codes it takes a tenth of the time that it takes on
        # levels.
        is_number = (part | before).bitwise_and_(size).add_(size)
        part.bitwise_xor_((part ^ before).bitwise_and_(sign).bitwise_and_(is_number.bitwise_not_()))


def in_pieces(one: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield parts of two tensors with as many elements, in which all elements are on one axis: what is computed of a part stays in
    the processor's cache, and no new memory is mapped for it.

    Args:
        one: any; other: contiguous.
    """
    import torch

    yield from zip(torch.split(one.reshape(-1), _PIECE), torch.split(other.view(-1), _PIECE), strict=True)


def as_floats(stored: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return scales as float32, in their shape. All dtypes are exact in it.

    Args:
        stored: F32, BF16 or F16; bytes for the dtypes of `values_of_codes`.
        dtype: what they are.
    """
    import torch

    if dtype in _FLOAT8 or dtype in _EXPONENTS:
        out = torch.empty(stored.shape, dtype=torch.float32, device=stored.device)
        look_up(stored, dtype, out)
        return out
    return stored.to(torch.float32)


def bytes_of(dtype: str) -> str:
    """Return the dtype in which `as_floats` and `look_up` want something stored.

    Example:
        >>> bytes_of("F8_E4M3"), bytes_of("BF16")
        ('U8', 'BF16')
    """
    return "U8" if dtype in _FLOAT8 or dtype in _EXPONENTS else dtype

"""Stored bytes → numbers: floats of every stored dtype, and integers packed at any width."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import inf, isfinite, nan
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch  # noqa: TC004 - a field's type, never evaluated

_WIDE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WHOLE = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The value of each code of four bits (OCP Microscaling Formats 1.0, E2M1)."""


@dataclass(frozen=True, slots=True)
class Raw:
    """Rows of a stored part, as bytes.

    Shapes:
        content: uint8 ``[rows, bytes of a row]``.
    """

    content: torch.Tensor

    dtype: str
    """What the file says they are, a safetensors code."""

    def floats(self, dtype: str = "") -> torch.Tensor:
        """Return them as float64 ``[rows, values]``, which is exact.

        Args:
            dtype: what the bytes mean, where the file calls them integers: ``"F8_E4M3"``, ``"F8_E5M2"``, ``"F8_E8M0"``.
        """
        import torch

        known = self.dtype if self.dtype in _WIDE or not dtype else dtype
        if known in _WIDE:
            return self.content.view(getattr(torch, _WIDE[known])).double()
        if known in _BYTES:
            return looked_up(_table(known), self.content)
        return self.integers().double()

    def integers(self) -> torch.Tensor:
        """Return them as int64 ``[rows, values]``."""
        import torch

        return self.content.view(getattr(torch, _WHOLE[self.dtype])).long()

    def words(self) -> torch.Tensor:
        """Return them as unsigned words of 32 bits, int64 ``[rows, words]``."""
        import torch

        return self.content.view(torch.int32).long() & 0xFFFFFFFF

    def fields(self, bits: int) -> torch.Tensor:
        """Return unsigned integers of some bits each, int64 ``[rows, fields]``: number k begins at bit k · bits of the row.

        The lowest bit of the first byte is the first. So words of 32 bits, little end first, need no care: numbers may
        cross their borders.
        """
        import torch

        rows, n_bytes = self.content.shape
        if bits == 4:
            # The high half of a byte, moved up, is the byte after the low half.
            pairs = self.content.short()
            return (pairs | pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8).long()
        if 8 % bits == 0:
            # None crosses the border of two bytes, so each is cut out of its own.
            shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
            whole = (self.content[:, :, None] >> shifts).bitwise_and_((1 << bits) - 1)
            return whole.view(rows, -1).long()
        single = (self.content[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        count = 8 * n_bytes // bits
        single = single.view(rows, -1)[:, : count * bits].view(rows, count, bits)
        found = torch.zeros(rows, count, dtype=torch.int64)
        for n in range(bits):
            found += single[:, :, n].long() << n
        return found

    def nibbles(self) -> torch.Tensor:
        """Return numbers of four bits, int64 ``[rows, 2 · bytes]``; the low half of a byte is the first."""
        return self.fields(4)


def looked_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return what each code stands for. `torch.index_select` takes a third of the time of brackets."""
    return table.index_select(0, codes.long().flatten()).view(codes.shape)


@cache
def _table(dtype: str) -> torch.Tensor:
    """Return the value of each byte, float64 ``[256]``."""
    import torch

    return torch.tensor(byte_values(dtype), dtype=torch.float64)


@cache
def byte_values(dtype: str) -> tuple[float, ...]:
    """Return the value of each byte, ``[256]``: of ``"F8_E4M3"``, ``"F8_E5M2"``, ``"F8_E8M0"``."""
    return tuple(map(_BYTES[dtype], range(256)))


@cache
def table_of(dtype: str) -> torch.Tensor:
    """Return every number that a byte can be, in order: float64 ``[n]``, without infinity and NaN."""
    return distinct(_table(dtype))


def distinct(values: torch.Tensor) -> torch.Tensor:
    """Return every finite number among some, in order: float64 ``[n]``."""
    import torch

    return torch.tensor(sorted({value for value in values.tolist() if isfinite(value)}), dtype=torch.float64)


@cache
def e2m1_codes() -> torch.Tensor:
    """Return the value of each code of E2M1, float64 ``[16]``."""
    import torch

    return torch.tensor(E2M1, dtype=torch.float64)


@cache
def e2m1() -> torch.Tensor:
    """Return every number of E2M1, in order: float64 ``[15]``."""
    import torch

    return torch.tensor(sorted(set(E2M1)), dtype=torch.float64)


def _e4m3(code: int) -> float:
    """One sign, four bits of exponent with bias 7, three of fraction; no infinity (OCP 8-bit Floating Point 1.0)."""
    sign, exponent, fraction = -1.0 if code & 0x80 else 1.0, code >> 3 & 0xF, code & 7
    if exponent == 0xF and fraction == 7:
        return nan
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


def _e5m2(code: int) -> float:
    """One sign, five bits of exponent with bias 15, two of fraction, with infinity and NaN as float16 has them."""
    sign, exponent, fraction = -1.0 if code & 0x80 else 1.0, code >> 2 & 0x1F, code & 3
    if exponent == 0x1F:
        return nan if fraction else sign * inf
    return sign * (fraction / 4 * 2.0**-14 if exponent == 0 else (1 + fraction / 4) * 2.0 ** (exponent - 15))


def _e8m0(code: int) -> float:
    """A power of two with bias 127; 255 is NaN (OCP Microscaling Formats 1.0)."""
    return nan if code == 0xFF else 2.0 ** (code - 127)


_BYTES: dict[str, Callable[[int], float]] = {"F8_E4M3": _e4m3, "F8_E5M2": _e5m2, "F8_E8M0": _e8m0}

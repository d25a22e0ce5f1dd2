"""Lattices: the numbers that one code can stand for, before any scale. They are called *levels*, and are kept in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Lattice(Protocol):
    """Some numbers, in order. Beyond the last there are none: what lies there becomes the last (it *saturates*)."""

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest level and the largest."""

    def nearest_(self, numbers: torch.Tensor) -> torch.Tensor:
        """Turn float32 numbers into the nearest levels, in place, and return them. A level stays what it is, and so does
        the sign of a zero. Ties go where the storage's own library has them.
        """

    def neighbours(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the levels next to float32 numbers: the largest that is not above, the smallest that is above it.
        Beyond an end both are the end.
        """


@dataclass(frozen=True, slots=True)
class Integers:
    """Whole numbers from ``first`` to ``last``; ties to even."""

    first: int
    last: int

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last."""
        return float(self.first), float(self.last)

    def nearest_(self, numbers: torch.Tensor) -> torch.Tensor:
        """Round half to even, then cut off what is beyond an end."""
        return numbers.round_().clamp_(self.first, self.last)

    def neighbours(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the whole numbers below and above."""
        below = numbers.floor()
        return below.clamp(self.first, self.last), below.add(1).clamp_(self.first, self.last)


@dataclass(frozen=True, slots=True)
class Floats:
    """Floating-point numbers of a few bits; ties to even.

    All of them are exact in float32, whose own rounding does the work: added to a number whose last bit has the size of the
    wanted spacing, a float32 is rounded to that spacing.
    """

    mantissa_bits: int
    """Stored ones: 3 of E4M3."""

    smallest: int
    """Exponent of the smallest normal number, below which the spacing stays the same."""

    largest: float

    @property
    def ends(self) -> tuple[float, float]:
        """The largest number, of either sign."""
        return -self.largest, self.largest

    def nearest_(self, numbers: torch.Tensor) -> torch.Tensor:
        """Round half to even at the spacing that a number's exponent has."""
        import torch

        numbers.clamp_(-self.largest, self.largest)
        # 1.5 · 2^23 · spacing: its last bit is one spacing, and a sum with the number stays in its binade.
        big = self._power(numbers).mul_(1.5 * 2.0 ** (23 - self.mantissa_bits))
        rounded = numbers.add(big).sub_(big)
        # A sum has no negative zero.
        return torch.copysign(rounded, numbers, out=numbers)

    def neighbours(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the numbers below and above."""
        inside = numbers.clamp(-self.largest, self.largest)
        spacing = self._power(inside).mul_(2.0**-self.mantissa_bits)
        below = inside.div(spacing).floor_().mul_(spacing)
        return below.clamp(-self.largest, self.largest), below.add(spacing).clamp_(-self.largest, self.largest)

    def _power(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the power of two below each number's size, the smallest normal one at least."""
        import torch

        power = numbers.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
        return power.clamp_(min=2.0**self.smallest)


@dataclass(frozen=True, slots=True)
class Plain(Floats):
    """The numbers of a dtype that torch converts to, beyond whose largest is infinity."""

    dtype: str
    """As torch spells it."""

    def nearest_(self, numbers: torch.Tensor) -> torch.Tensor:
        """Convert there and back."""
        import torch

        return numbers.copy_(numbers.to(getattr(torch, self.dtype)))


E4M3 = Floats(3, -6, 448.0)
E5M2 = Floats(2, -14, 57344.0)
E2M1 = Floats(1, 0, 6.0)

PLAIN = {
    "BF16": Plain(7, -126, (2 - 2.0**-7) * 2.0**127, "bfloat16"),
    "F16": Plain(10, -14, 65504.0, "float16"),
    "F32": Plain(23, -126, (2 - 2.0**-23) * 2.0**127, "float32"),
}
"""The lattices of plain tensors, by safetensors code."""

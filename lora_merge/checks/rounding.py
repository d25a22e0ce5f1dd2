"""Rounding float64 to a stored dtype, once: to the nearest value, ties to even; and where a value lies between two."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PRECISION = {"F8_E4M3": 4, "BF16": 8, "F16": 11, "F32": 24}
"""Bits of the significand."""

SMALLEST = {"F8_E4M3": -9, "BF16": -133, "F16": -24, "F32": -149}
"""Exponent of the smallest subnormal."""

LARGEST = {"BF16": (2 - 2.0**-7) * 2.0**127, "F16": 65504.0, "F32": (2 - 2.0**-23) * 2.0**127}
"""The largest finite number."""


def rounded(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return float64 values rounded to a dtype, still in float64. Values beyond its range are not made infinite.

    torch's own conversion goes through float32, and rounds twice.
    """
    steps = step(values, dtype)
    # Dividing and multiplying by powers of two is exact, so rounding half to even is the only rounding.
    return values.div(steps).round_().mul_(steps)


def step(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return the distance between the two numbers of a dtype that each value lies between, in float64; at zero and at subnormal
    numbers the smallest.

    It is made from the bits of the exponents: `torch.frexp` and `torch.ldexp` take ten times as long.
    """
    import torch

    # A float64 is 1 sign bit, 11 bits of exponent + 1023, 52 bits of mantissa.
    exponents = (values.view(torch.int64) >> 52).bitwise_and_((1 << 11) - 1)
    exponents = exponents.sub_(PRECISION[dtype] - 1).clamp_(min=SMALLEST[dtype] + 1023)
    return exponents.bitwise_left_shift_(52).view(torch.float64)


def neighbours(low: torch.Tensor, high: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest number of a dtype that is not above ``low``, and the smallest that is not below ``high``. Beyond the
    largest number there is only that one.
    """
    below, above = (step(end, dtype) for end in (low, high))
    low, high = low.div(below).floor_().mul_(below), high.div(above).ceil_().mul_(above)
    return low.clamp(max=LARGEST[dtype]), high.clamp(min=-LARGEST[dtype])

"""Rounding float64 to a stored dtype, once: to the nearest value, ties to even; and where a value lies between two."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PRECISION = {"BF16": 8, "F16": 11, "F32": 24}
"""Bits of the significand."""

_SMALLEST = {"BF16": -133, "F16": -24, "F32": -149}
"""Exponent of the smallest subnormal."""

LARGEST = {"BF16": (2 - 2.0**-7) * 2.0**127, "F16": 65504.0, "F32": (2 - 2.0**-23) * 2.0**127}
"""The largest finite number."""


def rounded(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return float64 values rounded to a dtype, still in float64. Values beyond its range are not made infinite.

    torch's own conversion goes through float32, and rounds twice.
    """
    import torch

    exponents = _spacings(values, dtype)
    # torch.round rounds half to even. `ldexp` by powers of two is exact, so this is the only rounding.
    return torch.ldexp(torch.round(torch.ldexp(values, -exponents)), exponents)


def step(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return the distance between the two numbers of a dtype that each value lies between, in float64."""
    import torch

    return torch.ldexp(torch.ones_like(values), _spacings(values, dtype))


def neighbours(low: torch.Tensor, high: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest number of a dtype that is not above ``low``, and the smallest that is not below ``high``. Beyond the
    largest number there is only that one.
    """
    import torch

    below, above = (_spacings(end, dtype) for end in (low, high))
    low = torch.ldexp(torch.floor(torch.ldexp(low, -below)), below)
    high = torch.ldexp(torch.ceil(torch.ldexp(high, -above)), above)
    return low.clamp(max=LARGEST[dtype]), high.clamp(min=-LARGEST[dtype])


def _spacings(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return the exponent of the distance between numbers of a dtype at each value: int32."""
    import torch

    _, exponents = torch.frexp(values)
    return (exponents - _PRECISION[dtype]).clamp_(min=_SMALLEST[dtype])

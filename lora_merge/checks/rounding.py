"""Rounding float64 to a stored dtype, once: to the nearest value, ties to even."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PRECISION = {"BF16": 8, "F16": 11, "F32": 24}
"""Bits of the significand."""

_SMALLEST = {"BF16": -133, "F16": -24, "F32": -149}
"""Exponent of the smallest subnormal."""


def rounded(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return float64 values rounded to a dtype, still in float64. Values beyond its range are not made infinite.

    torch's own conversion goes through float32, and rounds twice.
    """
    import torch

    _, exponents = torch.frexp(values)
    exponents = (exponents - _PRECISION[dtype]).clamp_(min=_SMALLEST[dtype])
    # torch.round rounds half to even. `ldexp` by powers of two is exact, so this is the only rounding.
    return torch.ldexp(torch.round(torch.ldexp(values, -exponents)), exponents)

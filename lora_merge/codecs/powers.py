"""New scales that are powers of two, as compressed-tensors makes them: MXFP4 and MXFP8."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_HALF_STEP = 0x20
"""A quarter of the last power of two, in the bits of a bfloat16: sizes from 1.75 on count as 2. Half a step of E2M1, and used for
MXFP8 as well."""

_LARGEST = 254
"""The last exponent; 255 is NaN."""


def exponents(size: torch.Tensor, offset: int) -> torch.Tensor:
    """Return E8M0 codes, uint8, for the largest sizes of groups.

    Args:
        size: bfloat16, not negative, any shape.
        offset: the exponent of the largest level: 2 for E2M1 (6 = 1.5 · 2²), 8 for E4M3.

    Reference:
        compressed-tensors 0.20 ``generate_mx_scales``. Beyond 1.75 · 2^127 its exponent overflows to NaN; here it does not.
    """
    import torch

    bits = size.view(torch.int16).to(torch.int32)
    return bits.add_(_HALF_STEP).bitwise_right_shift_(7).sub_(offset).clamp_(0, _LARGEST).to(torch.uint8)


def powers_of(exponent: torch.Tensor) -> torch.Tensor:
    """Return what E8M0 codes mean: bfloat16, exact, 2^(code - 127)."""
    import torch

    bits = exponent.to(torch.int16)
    # Exponent 0 is 2^-127, which is subnormal: the upper bit of the mantissa.
    return torch.where(bits == 0, 0x40, bits << 7).to(torch.int16).view(torch.bfloat16)

"""What new scales must be: the scale that a scheme's library makes of the largest value of a block, and its zero point, in float64.

Written from the description of the schemes, apart from `lora_merge.codecs` on purpose.

What is tolerated follows from what float32 may be off: it had the largest value of a block between two limits. Every step from there to
the scale is a rounding, a product or a quotient, which keep order (or turn it round), so the scale is between those of the limits. The
first step rounds values to bfloat16, and limits that are close together mostly become one number there: then one scale is right, and
no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lora_merge.checks.rounding import LARGEST, rounded, step

if TYPE_CHECKING:
    import torch  # noqa: TC004 - a field's type, never evaluated

    from lora_merge.core.plan import Merge
    from lora_merge.core.weight import Storage

SCALE, ZERO, GLOBAL = "scale", "zero", "global"

_EPSILON = 2.0**-7
"""Of bfloat16: compressed-tensors' scale for a block whose scale would be zero."""

_LOWEST, _HIGHEST = -8, 7
"""The integers of four bits."""

_BLOCK = 32
"""Values of a group of gpt-oss."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How a scale follows from the values that share it."""

    scale: Callable[[torch.Tensor], torch.Tensor]
    """Sizes, numbers of bfloat16 → scales, float64. Where a scale would be zero or infinite, it is that here."""

    empty: float = 0.0
    """What is stored in the place of such a scale."""

    rows: int = 1
    """Rows of a block."""

    columns: int = 0
    """Columns of a block; 0 for all."""

    has_zeros: bool = False
    """True where the size is the distance from the lowest to the highest value, with 0 among them. It is else the largest magnitude."""

    is_transposed: bool = False
    """True where the scales are stored the other way round than the weight: groups of a column's values."""

    def stored(self, size: torch.Tensor) -> torch.Tensor:
        """Return the scales that are stored for some sizes."""
        found = self.scale(size)
        return found.where(_is_scale(found), self.empty)

    def is_explained(self, found: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """Return for each stored scale whether a size between two limits has it, bool. NaN is never explained.

        Args:
            found: float64, any shape.
            size: numbers of bfloat16: the lower limit and the upper one, ``[2, …]``.
        """
        is_right = found == self.stored(size[0])
        # It is for most, and the rest takes longer.
        if not is_right.all():
            left = ~is_right
            is_right[left] = self._is_explained(found[left], size[:, left])
        return is_right

    def _is_explained(self, found: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        is_end = (found == self.stored(size)).any(0)
        ends = self.scale(size)
        is_between = _is_scale(found) & (ends.amin(0) <= found) & (found <= ends.amax(0))
        # Two limits without a number between them are the only sizes.
        is_wide = size[0] + step(size[0], "BF16") < size[1]
        return is_end | is_between & is_wide


def zeros_explained(
    rule: Rule, found: torch.Tensor, scale: torch.Tensor, size: torch.Tensor, lowest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each stored zero point whether it is right for the stored scale, bool; and the limits of right ones, ``[2, …]``.

    Args:
        rule: of the scheme.
        found: float64, any shape.
        scale: what is stored, in the same shape.
        size: the limits of the sizes, ``[2, …]``; lowest: of how far the lowest values are below zero.
    """
    # Where the scale would be zero, it is what values are divided by, and the library's cast makes 0 of NaN.
    is_empty = rule.scale(size) == 0
    quotient = (lowest / scale.where(~is_empty, 0.0)).nan_to_num(nan=-_LOWEST)
    ends = rounded(rounded(quotient, "BF16") + _LOWEST, "BF16").clamp(_LOWEST, _HIGHEST).round()
    is_between = (ends.amin(0) <= found) & (found <= ends.amax(0))
    return is_between | (is_empty[0] != is_empty[1]), ends


def rule_of(op: Merge, overall: torch.Tensor | None) -> Rule | None:
    """Return how the scales of a merged weight are made; None where the merge makes none, or none that is known here.

    Args:
        op: what was done.
        overall: the stored scale of the whole tensor, float64 ``[1]``, where there is one.
    """
    if op.on_stored_grid or op.target.codec not in RULES:
        return None
    return RULES[op.target.codec](op.target, overall)


def rule_of_overall() -> Rule:
    """Return how NVFP4's scale of a whole tensor follows from the largest magnitude of all weights that share it."""
    return Rule(_of_all, 1.0)


def _is_scale(found: torch.Tensor) -> torch.Tensor:
    return (found > 0) & found.isfinite()


def _scaled(storage: Storage, _: torch.Tensor | None) -> Rule:
    settings = dict(storage.settings)
    rows, columns = int(settings["block_rows"]), int(settings["block_columns"])
    is_fp8 = settings["codes"] == "F8_E4M3"
    if settings[SCALE] == "F32":
        return Rule(_inverse, 1.0, rows, columns)
    if settings[SCALE] == "BF16":
        return Rule(partial(_share, parts=448.0 if is_fp8 else 127.5), _EPSILON, rows, columns)
    return Rule(partial(_power, levels=8), rows=rows, columns=columns)


def _packed_int(storage: Storage, _: torch.Tensor | None) -> Rule:
    settings = dict(storage.settings)
    has_zeros = bool(settings[ZERO])
    share = partial(_share, parts=15.0 if has_zeros else 7.5)
    return Rule(share, _EPSILON, columns=int(settings["group"]), has_zeros=has_zeros)


def _fp4(storage: Storage, overall: torch.Tensor | None) -> Rule:
    group = int(dict(storage.settings)["group"])
    if overall is None:
        return Rule(partial(_power, levels=2), columns=group)
    return Rule(partial(_e4m3, overall=overall), 0.125, columns=group)


def _mxfp4_experts(_: Storage, __: torch.Tensor | None) -> Rule:
    return Rule(_power_above, rows=_BLOCK, columns=1, is_transposed=True)


RULES: Mapping[str, Callable[[Storage, torch.Tensor | None], Rule]] = {
    "scaled": _scaled,
    "packed_int": _packed_int,
    "fp4": _fp4,
    "mxfp4_experts": _mxfp4_experts,
}
"""By codec, those that make new scales. Of a codec that is missing here, values are checked with the scales that are stored."""


def _share(size: torch.Tensor, parts: float) -> torch.Tensor:
    """Return the scales of compressed-tensors: a part of the size, in bfloat16."""
    return rounded(size / parts, "BF16")


def _inverse(size: torch.Tensor) -> torch.Tensor:
    """Return the scales of transformers' ``fp8``: the inverse of 448 / size, in float32."""
    factor = rounded(rounded(1 / size, "F32") * 448, "F32")
    return rounded(1 / factor, "F32").masked_fill_(factor > LARGEST["F32"], 0)


def _power(size: torch.Tensor, levels: int) -> torch.Tensor:
    """Return the scales of compressed-tensors' MX formats: sizes from 1.75 · 2ⁿ on count as 2ⁿ⁺¹.

    Args:
        size: numbers of bfloat16.
        levels: the exponent of the largest level.
    """
    # 1.75 / 0.875 is 2, and the quotients of smaller numbers of bfloat16 are below it.
    _, exponent = (size / 0.875).frexp()
    return _power_of_two((exponent - 1 - levels).masked_fill_(size == 0, -127))


def _power_above(size: torch.Tensor) -> torch.Tensor:
    """Return the scales of triton_kernels: the smallest power of two that is not below a sixth; for sizes above zero at least 2⁻¹²⁶."""
    sixth = rounded(size / 6, "F32")
    fraction, exponent = sixth.frexp()
    # A fraction of a half is a power of two.
    above = (exponent - (fraction == 0.5).int()).clamp_(min=-126)
    return _power_of_two(above.masked_fill_(sixth == 0, -127))


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Return what E8M0 has of some powers of two: those of -127 to 127."""
    import torch

    return exponent.clamp(-127, 127).long().add_(1023).bitwise_left_shift_(52).view(torch.float64)


def _e4m3(size: torch.Tensor, overall: torch.Tensor) -> torch.Tensor:
    """Return the scales of NVFP4 in compressed-tensors: a sixth of the size, times the scale of the tensor."""
    wanted = rounded(rounded(size / 6, "BF16") * overall, "F32")
    return rounded(wanted.clamp(max=448), "F8_E4M3")


def _of_all(size: torch.Tensor) -> torch.Tensor:
    """Return the scales of whole tensors, of NVFP4 in compressed-tensors: 448 · 6 / size, in bfloat16."""
    found = rounded(rounded(1 / size.clamp(min=2.0**-126), "BF16") * (448 * 6), "BF16")
    return found.masked_fill_(found > LARGEST["BF16"], float("inf"))

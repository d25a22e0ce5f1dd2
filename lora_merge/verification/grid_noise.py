"""How far rounding may move the values of a merged weight, by how it is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.tensor import UNIT_ROUNDOFF

if TYPE_CHECKING:
    from lora_merge.core.plan import Merge

_BYTES = {"F8_E4M3": 0.045, "F8_E5M2": 0.09, "I8": 0.03}
_FOUR_BITS = {"fp4": 0.21, "mxfp4_experts": 0.21, "bnb4": 0.2}
_OF_INTEGERS = 0.27
"""Of four bits in groups of 128. Each bit more halves it, each bit less doubles it."""

_MOST = {"nearest": 1.0, "stochastic": 1.5, "adapter": 3.0}
"""How much more noise than the nearest numbers a rounding may make of a plain dtype, in narrow matrices."""

_MOST_ON_GRIDS = 1.5
"""The same of a grid, beside the error that any weight has on it."""


def noise_of(op: Merge) -> float:
    """Return the largest error that rounding makes of a value, relative to the usual size of the weight's values.

    Errors of grids are those of normally distributed weights, √3 times the standard deviation, as a rounding error is
    anywhere between the two ends of a step.
    """
    method = "nearest" if op.rounding is None else op.rounding.method
    target = op.target
    if target.is_dense:
        return UNIT_ROUNDOFF.get(target.dtype, 0.0) * _MOST[method]
    settings = dict(target.settings)
    if target.codec in _FOUR_BITS:
        return _MOST_ON_GRIDS * _FOUR_BITS[target.codec]
    if target.codec in {"scaled", "llm_int8"}:
        return _MOST_ON_GRIDS * _BYTES.get(str(settings.get("codes", "I8")), _BYTES["F8_E5M2"])
    bits = int(settings.get("bits", 4))
    return _MOST_ON_GRIDS * max(_OF_INTEGERS * 2.0 ** (4 - bits), _BYTES["I8"])

"""Which tensors of a directory store a weight together: codes, scales, and what else belongs to them, by their names alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_merge.core.tensor import TORCH_NAMES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.tensor import TensorRef  # noqa: TC004 - a field's type, never evaluated

_PACKED = (".qweight", ".weight_packed", "._weight_qdata")
"""Ends of names that only codes have: GPTQ and AWQ, compressed-tensors, torchao."""

_SCALES = (".weight_scale_inv", ".weight_scale", "._weight_scale", ".SCB", ".weight.absmax")
"""Ends of names that only scales have; of the last two, bitsandbytes'."""

_PLAIN_SCALES = (".scales", ".qscale_weight", ".scale", "_scale_inv", "_scale")
"""Ends of names of scales that other parameters may have too: they count beside codes only."""

_SHARED = (".weight_global_scale", ".weight_scale_2")
"""Ends of names of a scale for a whole weight, beside those of its groups: NVFP4."""

_OTHERS = (
    ".qzeros",
    ".weight_zero_point",
    "._weight_zero_point",
    ".weight_shape",
    ".weight_g_idx",
    ".weight_format",
    ".pre_quant_scale",
    ".weight.quant_map",
    ".weight.nested_absmax",
    ".weight.nested_quant_map",
    ".input_scale",
    ".input_scale_ub",
    ".input_global_scale",
)
"""Ends of names of what belongs to codes, and says nothing alone."""

_PLAIN_OTHERS = (".g_idx", ".biases")
_STATE = ".weight.quant_state."

_BYTES = frozenset({"U8", "I8", "U32", "I32"})
"""Dtypes of codes in ``.weight``: bitsandbytes, ModelOpt, MLX, INT8."""


@dataclass(slots=True)
class Module:
    """One weight as it is stored: by codes and scales, or dense."""

    name: str
    """Path of its module; of a parameter that is not a module's ``weight`` (stacked experts), its own name."""

    codes: TensorRef | None = None
    scales: TensorRef | None = None
    shared: TensorRef | None = None
    """The scale for the whole weight that NVFP4 has beside those of the groups."""

    dense: TensorRef | None = None
    """The weight in full precision, a matrix or a stack of matrices."""

    others: list[TensorRef] = field(default_factory=list)
    """Zero points, orders, tables and the like."""

    @property
    def is_quantised(self) -> bool:
        """True where it has codes or scales."""
        return self.codes is not None or self.scales is not None

    @property
    def parts(self) -> list[TensorRef]:
        """Everything that belongs to a quantised weight."""
        return [ref for ref in (self.codes, self.scales, self.shared, *self.others) if ref is not None]

    @property
    def is_whole(self) -> bool:
        """True where it is stored in one way, with all that this takes."""
        if self.dense is not None:
            return not self.parts
        return self.codes is not None and self.scales is not None


def grouped(tensors: Mapping[str, TensorRef]) -> dict[str, Module]:
    """Return the matrices of a directory by the path of their module.

    Args:
        tensors: by name.
    """
    found: dict[str, Module] = {}
    for ref in tensors.values():
        name = _owner_of_codes(ref, tensors)
        if name is not None:
            _module(found, name).codes = ref
    for ref in tensors.values():
        _place(ref, tensors, found)
    return found


def _module(found: dict[str, Module], name: str) -> Module:
    if name not in found:
        found[name] = Module(name)
    return found[name]


def _owner_of_codes(ref: TensorRef, tensors: Mapping[str, TensorRef]) -> str | None:
    """Return the path of the module whose codes a tensor has; None for any other tensor."""
    name = ref.name
    if len(ref.shape) < 2:
        return None
    if (owner := _ends(name, _PACKED)) is not None:
        return owner
    if name.endswith("_blocks") and ref.dtype == "U8":
        return name.removesuffix("_blocks")
    if ref.dtype.startswith(("F8_", "F6_", "F4")):
        return None if _ends(name, (*_SCALES, *_PLAIN_SCALES, "_scales")) else name.removesuffix(".weight")
    # bitsandbytes may store the bytes of its codes as another dtype: one column, which no matrix has.
    is_column = f"{name}.absmax" in tensors and ref.shape[-1] == 1
    if name.endswith(".weight") and (ref.dtype in _BYTES or is_column):
        return name.removesuffix(".weight")
    return None


def _ends(name: str, ends: tuple[str, ...]) -> str | None:
    """Return the part of a name before one of some ends; None where it has none of them."""
    if not name.endswith(ends):  # nearly all names: one call, since there may be a hundred thousand
        return None
    return next(name.removesuffix(end) for end in ends if name.endswith(end))


def _place(ref: TensorRef, tensors: Mapping[str, TensorRef], found: dict[str, Module]) -> None:
    """Put a tensor that has no codes into its module."""
    name = ref.name
    owner = _ends(name, _SCALES)
    if owner is not None or ((owner := _ends(name, ("_scales",))) is not None and ref.dtype == "U8"):
        _module(found, owner).scales = ref
    elif (owner := _ends(name, _SHARED)) is not None:
        _module(found, owner).shared = ref
    elif (owner := _ends(name, _OTHERS)) is not None or _STATE in name:
        _module(found, owner if owner is not None else name.partition(_STATE)[0]).others.append(ref)
    elif (owner := _ends(name, _PLAIN_SCALES)) is not None and _is_beside(owner, name, tensors, found):
        _module(found, owner).scales = ref
    elif (owner := _ends(name, _PLAIN_OTHERS)) is not None and _is_beside(owner, name, tensors, found):
        _module(found, owner).others.append(ref)
    elif ref.dtype in TORCH_NAMES and len(ref.shape) in {2, 3} and ref.nbytes:
        owner = name.removesuffix(".weight")
        # Codes of bitsandbytes are floats at times.
        if owner not in found or found[owner].codes is not ref:
            _module(found, owner).dense = ref


def _is_beside(owner: str, name: str, tensors: Mapping[str, TensorRef], found: Mapping[str, Module]) -> bool:
    """Return True where a tensor with a common name belongs to codes, or did before they went away."""
    if owner in found and found[owner].codes is not None:
        return True
    if not name.endswith((".scales", ".biases", ".g_idx")):
        return False
    # GPTQ and AWQ; MLX.
    mates = ({f"{owner}.scales", f"{owner}.qzeros"}, {f"{owner}.scales", f"{owner}.biases"})
    if any(pair <= tensors.keys() for pair in mates):
        return True
    weight = tensors.get(f"{owner}.weight")
    return weight is not None and len(weight.shape) >= 2 and weight.dtype in TORCH_NAMES

"""MLX: codes of two to eight bits in words along the inputs; embeddings and heads too."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_merge.core.report import error
from lora_merge.core.tensor import shape_text
from lora_merge.quantised.draft import AGAIN, CODE, NOTHING, Draft, Wanted, codes_of, number, storage
from lora_merge.quantised.exceptions import Exceptions
from lora_merge.quantised.tables import settings_of, table_of, tables_of
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.tensor import TensorRef
    from lora_merge.core.weight import Storage
    from lora_merge.quantised.method import Found, Surroundings

_ORPHANS = re.compile(r"\.(scales|biases)$")
_BITS = (2, 3, 4, 5, 6, 8)
_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""Mode → its bits and its group, which are fixed."""

_STACKED = re.compile(r"\.switch_(?:mlp|glu)\.")
"""Experts as mlx-lm stacks them (mlx-lm 0.32, ``SwitchGLU``); transformers has other names, or has them one by one."""

_VISION = re.compile(r"^(?:language_model|vision_tower|audio_tower|multi_modal_projector)\.")
"""Beginnings of names in mlx-vlm."""


def is_mlx(settings: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return True where settings, as `settings_of` finds them, are of MLX."""
    return any(table.method == "mlx" for table in tables_of(settings))


def named_by_mlx(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> str:
    """Return the first parameter with a name or layout that only mlx-lm uses; empty if there is none."""
    return next((name for name, shape in shapes.items() if _is_odd(name, shape, config)), "")


def _is_odd(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> bool:
    """Return True for stacked experts, for convolutions with channels last, and for names of mlx-vlm."""
    if _STACKED.search(name):
        return True
    # A depthwise kernel is [out, 1, size] in transformers, and [out, size, 1] in mlx-lm.
    if "conv" in name and len(shape) >= 3 and shape[-1] == 1 != shape[1]:
        return True
    return "vision_config" in config and _VISION.match(name) is not None


class _Scheme(NamedTuple):
    mode: str
    bits: int
    group: int


class Mlx:
    """``quantization`` of mlx-lm: ``{group_size, bits, mode}``, and for single modules a table or false. Source: MLX 0.32."""

    def identify(self, tensors: Mapping[str, TensorRef], around: Surroundings) -> Found:
        """Return the weights that are stored so."""
        table = table_of(settings_of(around.config, around.side), "mlx")
        if table is None:
            return NOTHING
        draft = Draft(tensors, table)
        modules = {key: value for key, value in table.values.items() if isinstance(value, dict | bool)}
        default = _scheme(table.values, None)
        for ref in list(tensors.values()):
            if ref.name.endswith(".weight") and ref.dtype == "U32":
                own = modules.get(ref.name.removesuffix(".weight"))
                _add(draft, ref, _scheme(own, default) if isinstance(own, dict) else default)
        dense = [module for module, value in modules.items() if value is False]
        exceptions = Exceptions("its modules that are false", dense, "targets", around)
        return draft.done(exceptions, _ORPHANS, "a weight in words (U32)")


def _scheme(values: Mapping[str, Any], default: _Scheme | None) -> _Scheme:
    mode = values.get("mode", default.mode if default else "affine")
    bits, group = number(values, "bits"), number(values, "group_size")
    fixed = _MODES.get(str(mode), (4, 64))
    # A module with another mode takes that mode's defaults, not the table's.
    if default is not None and mode == default.mode:
        fixed = (default.bits, default.group)
    return _Scheme(str(mode), fixed[0] if bits is None else bits, fixed[1] if group is None else group)


def _add(draft: Draft, ref: TensorRef, scheme: _Scheme) -> None:
    mode, bits, group = scheme
    good = (bits in _BITS and group > 0) if mode == "affine" else _MODES.get(mode) == (bits, group)
    if not good or len(ref.shape) < 2 or ref.shape[-1] * 32 % bits:
        sentence = (
            f"has shape {shape_text(ref.shape)}, and {draft.table.place} gives it the mode {quoted(mode)} with "
            f"{bits} bits in groups of {group}: this is not a storage of MLX"
        )
        draft.refuse(error(CODE, ref.name, sentence, AGAIN), [ref])
        return
    prefix = ref.name.removesuffix("weight")
    shape = (*ref.shape[:-1], ref.shape[-1] * 32 // bits)
    scales = (*shape[:-1], -(-shape[-1] // group))
    found = draft.tensors.get(f"{prefix}scales")
    floats = ("BF16", "F16", "F32") if mode == "affine" else ("U8",)
    wanted = [codes_of(ref.name, "U32", ref.shape), Wanted("scale", f"{prefix}scales", floats, (scales,))]
    if mode == "affine":
        # Both are made in the dtype of the weight, so they never differ.
        floats = (found.dtype,) if found is not None else floats
        wanted.append(Wanted("bias", f"{prefix}biases", floats, (scales,)))
    draft.add(ref.name, shape, _storage(scheme, found.dtype if found is not None else "BF16"), wanted)


def _storage(scheme: _Scheme, scale: str) -> Storage:
    mode, bits, group = scheme
    if mode == "affine":
        return storage("mlx_affine", "U32", bits=bits, group=group, scale=scale)
    if mode == "mxfp8":
        return storage("scaled", "U32", codes="F8_E4M3", block_rows=1, block_columns=group, scale="U8")
    kind = "E8M0" if mode == "mxfp4" else "E4M3"
    return storage("fp4", "U32", group=group, scale=kind, **{"global": "none"})

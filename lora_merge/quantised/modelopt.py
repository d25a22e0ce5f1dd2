"""ModelOpt: FP8, NVFP4, MXFP8 and AWQ of NVIDIA, one algorithm for all modules or one for each."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lora_merge.core.report import error
from lora_merge.quantised.draft import (
    AGAIN,
    CODE,
    NOTHING,
    Draft,
    Wanted,
    codes_of,
    module_of,
    number,
    storage,
)
from lora_merge.quantised.exceptions import Exceptions
from lora_merge.quantised.fp8 import row_shapes
from lora_merge.quantised.packed import ONE, add_fp4, add_scaled
from lora_merge.quantised.refused import parent_hint
from lora_merge.quantised.tables import settings_of, table_of
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lora_merge.core.tensor import TensorRef
    from lora_merge.quantised.method import Found, Surroundings

MIXED = "MIXED_PRECISION"
LISTS = ("ignore", "exclude_modules")
"""The names of the list of exceptions: in ``config.json`` and in ``hf_quant_config.json``."""

LAYERS = "quantized_layers"

_CACHE = ("kv_cache_quant_algo", "kv_cache_scheme")
_CODES = ("F8_E4M3", "U8")
_ORPHANS = re.compile(r"\.weight_scale(_2)?$")


class ModelOpt:
    """``quant_method`` modelopt. Source: ModelOpt 0.47 ``unified_export_hf``, vLLM ``ModelOptQuantConfigBase``."""

    def identify(self, tensors: Mapping[str, TensorRef], around: Surroundings) -> Found:
        """Return the weights that are stored so."""
        table = table_of(settings_of(around.config, around.side), "modelopt")
        if table is None:
            return NOTHING
        codes = [
            ref
            for ref in tensors.values()
            if ref.dtype in _CODES and ref.name.endswith(".weight") and len(ref.shape) >= 2
        ]
        if not codes and _is_cache_alone(table.values):
            return NOTHING
        draft = Draft(tensors, table)
        layers = table.values.get(LAYERS)
        each = layers if isinstance(layers, dict) else {}
        # With mixed precision each layer has a table, so one that is missing is a fault.
        default = None if _algorithm(table.values) == MIXED else table.values
        for ref in codes:
            _add(draft, ref, each.get(module_of(ref.name), default), around)
        lists = [table.values.get(key) or [] for key in LISTS]
        entries = [entry for found in lists if isinstance(found, list) for entry in found]
        exceptions = Exceptions(" and ".join(LISTS), entries, "wildcards", around)
        return draft.done(exceptions, _ORPHANS, "a weight in FP8 or U8")


def _algorithm(values: Mapping[str, Any]) -> str:
    return str(values.get("quant_algo") or "").upper()


def _is_cache_alone(values: Mapping[str, Any]) -> bool:
    """Return True where the cache of keys and values is quantised, and no weight is."""
    says_weights = values.get("quant_algo") or values.get(LAYERS)
    return not says_weights and any(values.get(key) for key in _CACHE)


def _add(draft: Draft, ref: TensorRef, values: object, around: Surroundings) -> None:
    if not isinstance(values, dict):
        sentence = f"is stored as {ref.dtype}, but {LAYERS} in {draft.table.place} does not name it"
        draft.refuse(error(CODE, ref.name, sentence, AGAIN), [ref])
        return
    algorithm = _algorithm(values)
    add = _ALGORITHMS.get(algorithm)
    if add is None:
        sentence = (
            f"quant_algo is {quoted(values.get('quant_algo'))}, expected one of {', '.join(_ALGORITHMS)}"
        )
        draft.refuse(error("unsupported", draft.table.place, sentence, parent_hint(around.config)), [ref])
        return
    dtype = "U8" if add in (_nvfp4, _awq) else "F8_E4M3"
    if ref.dtype != dtype:
        sentence = f"is stored as {ref.dtype}, expected {dtype}: quant_algo is {algorithm}"
        draft.refuse(error(CODE, ref.name, sentence, AGAIN), [ref])
        return
    prefix = ref.name.removesuffix("weight")
    # Engines multiply the inputs by it. Of our decoders only that of AWQ puts it into the weight.
    if add is not _awq and draft.has(f"{prefix}pre_quant_scale"):
        sentence = f"multiplies the inputs of a weight in {algorithm}, which is not supported"
        draft.refuse(error(CODE, f"{prefix}pre_quant_scale", sentence, parent_hint(around.config)), [ref])
        return
    # The side file tells the group where config.json does not.
    add(draft, ref, prefix, number(values, "group_size") or number(draft.table.values, "group_size"))


def _tensor(draft: Draft, ref: TensorRef, prefix: str, group: int | None) -> None:
    del group
    add_scaled(draft, ref, f"{prefix}weight_scale", (0, 0), ("F32", "BF16"), ONE)


def _rows(draft: Draft, ref: TensorRef, prefix: str, group: int | None) -> None:
    del group
    add_scaled(draft, ref, f"{prefix}weight_scale", (1, 0), ("F32", "BF16"), row_shapes(ref.shape))


def _blocks(draft: Draft, ref: TensorRef, prefix: str, group: int | None) -> None:
    side = group or 128
    rows, columns = (-(-n // side) for n in ref.shape[-2:])
    stack = ref.shape[:-2]
    # ModelOpt keeps the axes within a block, with size 1.
    shapes: tuple[tuple[int, ...], ...] = ((*stack, rows, 1, columns, 1), (*stack, rows, columns))
    if rows == columns == 1 and not stack:
        shapes = (*shapes, ())  # ModelOpt drops the axes of a single scale
    add_scaled(draft, ref, f"{prefix}weight_scale", (side, side), ("F32", "BF16"), shapes)


def _mxfp8(draft: Draft, ref: TensorRef, prefix: str, group: int | None) -> None:
    add_scaled(draft, ref, f"{prefix}weight_scale", (1, group or 32), ("U8", "F8_E8M0"))


def _nvfp4(draft: Draft, ref: TensorRef, prefix: str, group: int | None) -> None:
    if group not in (None, 16):
        sentence = f"group_size is {group}, expected 16 for NVFP4"
        draft.refuse(error(CODE, draft.table.place, sentence, AGAIN), [ref])
        return
    add_fp4(draft, ref.name, ref, f"{prefix}weight_scale", (f"{prefix}weight_scale_2", "multiply"))


def _awq(draft: Draft, ref: TensorRef, prefix: str, group: int | None) -> None:
    rows, columns = ref.shape[-2] * 2, ref.shape[-1]
    size = 128 if group is None else max(group, 0)
    wanted = [
        codes_of(ref.name, "U8", ref.shape),
        Wanted(
            "scale",
            f"{prefix}weight_scale",
            ("F32", "BF16", "F16"),
            ((rows, -(-columns // size) if size else 1),),
        ),
    ]
    pre = draft.tensors.get(f"{prefix}pre_quant_scale")
    if pre is not None:
        wanted.append(Wanted("pre_quant_scale", pre.name, ("F32", "BF16", "F16"), ((columns,),)))
    scale = draft.tensors.get(wanted[1].name)
    how = storage(
        "modelopt_awq",
        "U8",
        group=size,
        pre=pre.dtype if pre is not None else "",
        scale=scale.dtype if scale is not None else "F32",
    )
    draft.add(ref.name, (*ref.shape[:-2], rows, columns), how, wanted)


_ALGORITHMS: dict[str, Callable[[Draft, TensorRef, str, int | None], None]] = {
    "FP8": _tensor,
    "FP8_PER_CHANNEL_PER_TOKEN": _rows,
    "FP8_PB_WO": _blocks,
    "MXFP8": _mxfp8,
    "NVFP4": _nvfp4,
    "W4A16_NVFP4": _nvfp4,
    "W4A16_AWQ": _awq,
}

"""FP8 of DeepSeek, transformers and vLLM: codes of eight bits and float scales, one for each block or for the tensor."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lora_merge.core.report import error
from lora_merge.quantised.draft import AGAIN, CODE, NOTHING, Draft, Wanted, codes_of, grid, storage
from lora_merge.quantised.exceptions import Exceptions
from lora_merge.quantised.method import Found
from lora_merge.quantised.packed import add_scaled
from lora_merge.quantised.tables import settings_of, table_of
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.tensor import TensorRef
    from lora_merge.quantised.method import Surroundings

CODES = ("F8_E4M3", "F8_E5M2")
FLOATS = ("F32", "BF16", "F16")
POWERS = ("F8_E8M0", "U8")
"""Dtypes of scales that are powers of two."""

_SUFFIXES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
"""Of the scale beside a ``weight``: of DeepSeek-V3, of vLLM, of DeepSeek-V4, of Mistral."""

_PAIR = re.compile(r"([1-9]\d{0,8})x([1-9]\d{0,8})", re.ASCII)
_STACKED = ("_scale_inv", "_scale")
_ORPHANS_V4 = re.compile(r"\.(weight_scale_inv|weight_scale|scale)$|_scale_inv$")
_ORPHANS = re.compile(r"\.(weight_scale_inv|weight_scale|qscale_weight)$|_scale_inv$")


class Fp8:
    """``quant_method`` fp8 and mxfp8. Source: transformers 5.23 ``FineGrainedFP8Config``, vLLM ``Fp8Config``."""

    def identify(self, tensors: Mapping[str, TensorRef], around: Surroundings) -> Found:
        """Return the weights that are stored so."""
        table = table_of(settings_of(around.config, around.side), "fp8", "mxfp8")
        if table is None:
            return NOTHING
        draft = Draft(tensors, table)
        block = block_size(table.values.get("weight_block_size"))
        if table.method == "mxfp8":
            # Groups of MX formats always have 32 values, so the table may leave them out.
            block = block or (1, 32)
        if block is None and table.values.get("weight_block_size") is not None:
            got = quoted(table.values["weight_block_size"])
            issue = error(CODE, table.place, f"weight_block_size is {got}, expected two numbers", AGAIN)
            return Found({}, issues=(issue,))
        packed = _expert_dtype(around.config, table.values) == "fp4"
        for ref in list(tensors.values()):
            if ref.dtype in CODES and len(ref.shape) >= 2:
                _add(draft, ref, block)
            elif (
                packed and ref.dtype in ("I8", "U8") and len(ref.shape) >= 2 and ref.name.endswith(".weight")
            ):
                _add_packed(draft, ref)
        # vLLM asks for this name first; transformers knows the other one only.
        field = "ignored_layers" if table.values.get("ignored_layers") else "modules_to_not_convert"
        exceptions = Exceptions(field, table.values.get(field), "names", around)
        # Other families have a parameter of this name, so the dtype tells.
        is_scale = any(ref.name.endswith(".scale") and ref.dtype == "F8_E8M0" for ref in tensors.values())
        return draft.done(exceptions, _ORPHANS_V4 if is_scale else _ORPHANS, "a weight in FP8")


def block_size(value: object) -> tuple[int, int] | None:
    """Return the rows and columns of a block; None where a setting is not such a pair.

    Example:
        >>> block_size([128, 64]), block_size("128x64"), block_size(128)
        ((128, 64), (128, 64), None)
    """
    # As compressed-tensors spelled it before it had lists.
    text = _PAIR.fullmatch(value) if isinstance(value, str) else None
    if text is not None:
        return int(text[1]), int(text[2])
    if (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(n, int) and n > 0 for n in value)
    ):
        return value[0], value[1]
    return None


def scale_of(tensors: Mapping[str, TensorRef], name: str) -> str:
    """Return the name of the scale of some codes: of the one that is there, else as it is called mostly."""
    if not name.endswith(".weight"):
        names = [name + suffix for suffix in _STACKED]
    else:
        names = [name.removesuffix("weight") + suffix for suffix in _SUFFIXES]
    return next((one for one in names if one in tensors), names[0])


def row_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes in which a scale for each row may be stored."""
    return ((*shape[:-1], 1), shape[:-1])


def _add(draft: Draft, ref: TensorRef, block: tuple[int, int] | None) -> None:
    name = scale_of(draft.tensors, ref.name)
    scale = draft.tensors.get(name)
    rows, columns = block or (0, 0)
    shapes: tuple[tuple[int, ...], ...] = ()
    if block is None:
        # One scale for the tensor, or one for each row: no setting tells them apart, and both decode in one way.
        # Of a single row both are one number: it counts as that of the tensor.
        by_row = scale is not None and scale.shape in row_shapes(ref.shape) and ref.shape[-2] > 1
        rows = 1 if by_row else 0
        shapes = row_shapes(ref.shape) if by_row else ((), (1,), (1, 1))
    dtypes = (*FLOATS, *POWERS) if draft.table.method == "fp8" else POWERS
    add_scaled(draft, ref, name, (rows, columns), dtypes, shapes)


def _add_packed(draft: Draft, ref: TensorRef) -> None:
    """Add an expert of DeepSeek-V4: two codes of four bits in a byte, and a power of two for each 32."""
    shape = (*ref.shape[:-1], ref.shape[-1] * 2)
    name = scale_of(draft.tensors, ref.name)
    how = storage("fp4", ref.dtype, group=32, scale="E8M0", **{"global": "none"})
    scale = Wanted("scale", name, POWERS, (grid(shape, 1, 32),))
    draft.add(ref.name, shape, how, [codes_of(ref.name, ref.dtype, ref.shape), scale])


def _expert_dtype(config: Mapping[str, Any], values: Mapping[str, Any]) -> object:
    text = config.get("text_config")
    # The field of DeepSeek-V4, whose experts have codes of four bits among layers in FP8.
    levels = (values, config, text if isinstance(text, dict) else {})
    return next((level["expert_dtype"] for level in levels if level.get("expert_dtype")), None)

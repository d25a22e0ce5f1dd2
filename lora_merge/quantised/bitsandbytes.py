"""bitsandbytes: NF4 and FP4 in blocks over the flattened weight, and LLM.int8."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeGuard

from lora_merge.core.report import error
from lora_merge.core.tensor import MAX_DIMENSIONS, nbytes_of
from lora_merge.core.weight import WEIGHT
from lora_merge.quantised.draft import AGAIN, CODE, NOTHING, Draft, Wanted, codes_of, storage
from lora_merge.quantised.exceptions import Exceptions
from lora_merge.quantised.refused import parent_hint
from lora_merge.quantised.tables import QUANT_STATE, settings_of, table_of
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.tensor import TensorRef
    from lora_merge.quantised.method import Found, Surroundings

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_ORPHANS = re.compile(r"\.SCB$|\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)$")
_PACKED_AS = ("U8", "I8", "BF16", "F16", "F32")
"""Dtypes that the bytes of four-bit codes may be stored under (``bnb_4bit_quant_storage``)."""

# A real one has a few hundred bytes. A damaged header may name gigabytes, which are not read.
_MOST_JSON = 1 << 16
_FIELD = "llm_int8_skip_modules"


class Bitsandbytes:
    """``quant_method`` bitsandbytes. Source: bitsandbytes 0.50 ``QuantState.as_dict`` and ``Linear8bitLt``."""

    def identify(self, tensors: Mapping[str, TensorRef], around: Surroundings) -> Found:
        """Return the weights that are stored so. What each weight of four bits is, its own JSON says."""
        table = table_of(settings_of(around.config, around.side), "bitsandbytes")
        if table is None:
            return NOTHING
        draft = Draft(tensors, table)
        # transformers writes the setting under both names.
        four = bool(table.values.get("load_in_4bit", table.values.get("_load_in_4bit")))
        dtypes: set[str] = set()
        for ref in list(tensors.values()):
            if four and _STATE in ref.name:
                _add_four(draft, ref, around, dtypes)
            elif not four and ref.dtype == "I8" and ref.name.endswith(".weight"):
                _add_eight(draft, ref, around)
        exceptions = Exceptions(_FIELD, table.values.get(_FIELD), "names", around)
        codes = "a weight with its quant_state" if four else "a weight in I8"
        found = draft.done(exceptions, _ORPHANS, f"{codes} (load_in_{4 if four else 8}bit)")
        # A dense output takes this dtype if the configuration names none.
        if len(dtypes) == 1:
            return replace(found, settings={QUANT_STATE: {"dtype": dtypes.pop()}})
        return found


def _add_four(draft: Draft, ref: TensorRef, around: Surroundings, dtypes: set[str]) -> None:
    name, _, kind = ref.name.partition(_STATE)
    codes = draft.tensors.get(name)
    state = _state(ref, around)
    is_nested = "nested_offset" in state or draft.has(f"{name}.nested_absmax")
    fault = _fault(kind, state) or (_nested_fault(state) if is_nested else "")
    if fault or codes is None:
        subject, sentence = (ref.name, fault) if fault else (name, "is missing, but its quant_state exists")
        draft.refuse(error(CODE, subject, sentence, AGAIN), draft.beside(name))
        return
    shape, block = tuple(state["shape"]), state["blocksize"]
    n = math.prod(shape)
    n_blocks = -(-n // block)
    how = storage(
        "bnb4",
        codes.dtype,
        block=block,
        nested=256 if is_nested else 0,
        offset=float(state["nested_offset"]) if is_nested else 0.0,
        type=kind,
    )
    wanted = [
        Wanted(WEIGHT, name, _PACKED_AS, (codes.shape,)),
        Wanted("absmax", f"{name}.absmax", ("U8",) if is_nested else ("F32",), ((n_blocks,),)),
        Wanted("table", f"{name}.quant_map", ("F32",), ((16,),)),
    ]
    if is_nested:
        wanted += [
            Wanted("nested_absmax", f"{name}.nested_absmax", ("F32",), ((-(-n_blocks // 256),),)),
            Wanted("nested_table", f"{name}.nested_quant_map", ("F32",), ((256,),)),
        ]
    # The JSON is a part too: it is copied or left out with the codes.
    wanted.append(Wanted(f"quant_state.bitsandbytes__{kind}", ref.name, ("U8",), (ref.shape,)))
    # Packed bytes may be stored under any dtype, whose width they are padded to.
    least, most = (n + 1) // 2, (n + 1) // 2 + nbytes_of(codes.dtype, (1,)) - 1
    if not least <= codes.nbytes <= most:
        sentence = f"has {codes.nbytes} bytes, expected {least} for the shape {quoted(list(shape))} of its quant_state"
        draft.refuse(error(CODE, name, sentence, AGAIN), draft.beside(name))
    elif draft.add(name, shape, how, wanted) and isinstance(state.get("dtype"), str):
        dtypes.add(state["dtype"])


def _state(ref: TensorRef, around: Surroundings) -> dict[str, Any]:
    """Return the JSON of a weight; empty where it is none."""
    if ref.dtype != "U8" or ref.nbytes > _MOST_JSON:
        return {}
    try:
        found = json.loads(around.read(ref))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _fault(kind: str, state: Mapping[str, Any]) -> str:
    """Return what is wrong with the JSON of a weight; empty where it can be used."""
    if kind not in _KINDS:
        return f"is a quant_state of {quoted(kind)}, expected {' or '.join(_KINDS)}"
    shape, block = state.get("shape"), state.get("blocksize")
    if (
        not isinstance(shape, list)
        or not 0 < len(shape) <= MAX_DIMENSIONS
        or not all(_is_size(n) for n in shape)
    ):
        return f"gives the shape {quoted(shape)}, expected a list of sizes"
    # Two codes share a byte, so an odd block would end inside one. The library takes powers of two from 32.
    if not _is_size(block) or block % 2:
        return f"gives the blocksize {quoted(block)}, expected an even number"
    named = state.get("quant_type")
    return f"gives the quant_type {quoted(named)}, but its name says {kind}" if named != kind else ""


def _nested_fault(state: Mapping[str, Any]) -> str:
    """Return what is wrong with what it says of double quantisation."""
    # `quantize_4bit` has no setting for it: absmax is always quantised in blocks of 256.
    if state.get("nested_blocksize", 256) != 256:
        return f"gives the nested_blocksize {quoted(state['nested_blocksize'])}, expected 256"
    if "nested_offset" not in state:
        return "gives no nested_offset, but the weight is double-quantised"
    offset = state["nested_offset"]
    if not isinstance(offset, int | float) or not math.isfinite(offset):
        return f"gives the nested_offset {quoted(offset)}, expected a number"
    return ""


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40


def _add_eight(draft: Draft, ref: TensorRef, around: Surroundings) -> None:
    prefix = ref.name.removesuffix("weight")
    layout = draft.tensors.get(f"{prefix}weight_format")
    if layout is not None and any(around.read(layout)):
        sentence = "is not 0: a layout of the codes for a special kernel, which is not supported"
        draft.refuse(error(CODE, layout.name, sentence, parent_hint(around.config)), [ref, layout])
        return
    wanted = [
        codes_of(ref.name, "I8", ref.shape),
        Wanted("scale", f"{prefix}SCB", ("F32",), (ref.shape[:1],)),
    ]
    draft.add(ref.name, ref.shape, storage("llm_int8", "I8"), wanted)

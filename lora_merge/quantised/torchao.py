"""torchao: the header's metadata name the class of each weight, and the blocks that share a scale."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from lora_merge.core.report import error
from lora_merge.quantised.draft import AGAIN, CODE, NOTHING, Draft, Wanted, codes_of, grid
from lora_merge.quantised.exceptions import Exceptions
from lora_merge.quantised.packed import scaled_storage
from lora_merge.quantised.refused import parent_hint
from lora_merge.quantised.tables import settings_of, table_of
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.tensor import TensorRef
    from lora_merge.quantised.method import Found, Surroundings

_CODES = "_weight_qdata"
_ORPHANS = re.compile(r"\._weight_(qdata|scale|zero_point)$")
_CLASSES = {"Float8Tensor": ("F8_E4M3", "F8_E5M2"), "Int8Tensor": ("I8",)}
"""Class of torchao → dtypes of its codes."""


class TorchAO:
    """``quant_method`` torchao. Source: torchao 0.18 ``Float8Tensor`` and ``Int8Tensor``.

    ``X._weight_qdata`` and ``X._weight_scale`` store the parameter ``X.weight``.
    """

    def identify(self, tensors: Mapping[str, TensorRef], around: Surroundings) -> Found:
        """Return the weights that are stored so."""
        table = table_of(settings_of(around.config, around.side), "torchao")
        if table is None:
            return NOTHING
        draft = Draft(tensors, table)
        for ref in list(tensors.values()):
            if ref.name.endswith(f".{_CODES}"):
                _add(draft, ref, around)
        field = "modules_to_not_convert"
        exceptions = Exceptions(field, table.values.get(field), "names", around)
        return draft.done(exceptions, _ORPHANS, _CODES)


def _add(draft: Draft, ref: TensorRef, around: Surroundings) -> None:
    prefix = ref.name.removesuffix(_CODES)
    name = f"{prefix}weight"
    kind, block, stored = _stated(around.metadata.get(name, ""))
    if kind not in _CLASSES:
        sentence = f"is stored by torchao, but {_unknown(ref, kind)}"
        draft.refuse(error(CODE, ref.name, sentence, parent_hint(around.config)), [ref])
        return
    if len(block) != len(ref.shape) or any(size < 1 for size in block) or len(block) < 2:
        sentence = f"the header gives it blocks of {quoted(list(block))}, expected a size for each axis"
        draft.refuse(error(CODE, ref.name, sentence, AGAIN), [ref])
        return
    scale = draft.tensors.get(f"{prefix}_weight_scale")
    # One scale for a whole axis is one storage, however long the axis is.
    rows, columns = (
        0 if size >= axis else size for size, axis in zip(block[-2:], ref.shape[-2:], strict=True)
    )
    shape = grid(ref.shape, rows, columns)
    wanted = [
        codes_of(ref.name, ref.dtype, ref.shape)._replace(dtypes=_CLASSES[kind]),
        Wanted("scale", f"{prefix}_weight_scale", ("F32", "BF16", "F16"), (shape,)),
    ]
    zero = draft.tensors.get(f"{prefix}_weight_zero_point")
    if "zero_point" in stored:
        wanted.append(Wanted("zero_point", f"{prefix}_weight_zero_point", ("I8",), (shape,)))
    # Codes are signed: torchao's symmetric scheme keeps a tensor of zeros.
    if zero is not None and any(around.read(zero)):
        sentence = "is not zero everywhere: asymmetric codes of torchao are not supported"
        draft.refuse(error(CODE, zero.name, sentence, parent_hint(around.config)), [ref, zero])
        return
    how = scaled_storage(ref, (rows, columns), scale.dtype if scale is not None else "F32")
    draft.add(name, ref.shape, how, wanted)


def _unknown(ref: TensorRef, kind: str) -> str:
    if not kind and not ref.file.endswith(".safetensors"):
        return "its file has no header that names its class: torchao is read from safetensors only"
    got = f"the header calls it {quoted(kind)}" if kind else "the header does not name its class"
    return f"{got}: only {' and '.join(_CLASSES)} are supported"


def _stated(text: str) -> tuple[str, tuple[int, ...], frozenset[str]]:
    """Return the class and the block of a weight, and the names of its parts, as the header states them."""
    try:
        table: Any = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return "", (), frozenset()
    if not isinstance(table, dict):
        return "", (), frozenset()
    data = table.get("_data")
    block = data.get("block_size") if isinstance(data, dict) else None
    sizes = block if isinstance(block, list) and all(isinstance(size, int) for size in block) else []
    names = table.get("_tensor_data_names")
    listed = frozenset(map(str, names)) if isinstance(names, list) else frozenset()
    return str(table.get("_type", "")), tuple(sizes), listed

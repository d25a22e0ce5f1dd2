"""Tensors that only quantised checkpoints have, where no method knows them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lora_merge.core.report import Issue, error
from lora_merge.quantised.outputs import leftover
from lora_merge.quantised.refused import parent_hint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_merge.core.tensor import TensorRef

_NAMES = re.compile(
    r"\.(qweight|qzeros|weight_packed|weight_scale|weight_scale_inv|weight_scale_2|weight_global_scale|SCB|absmax|quant_map"
    r"|qscale_weight|W_q|codebooks|weight\.(absmax|quant_map|quant_state\..+)|_weight_qdata)$|_(blocks|scales|scale_inv)$"
)
"""Of what is stored beside the codes of a weight, or of the codes themselves."""


def stray(tensors: Iterable[TensorRef], config: Mapping[str, Any]) -> list[Issue]:
    """Return an error for the first tensor that is stored quantised although nothing says how."""
    for ref in tensors:
        # A vector of eight bits may be a scale or a buffer; a matrix is a weight.
        is_code = ref.dtype.startswith(("F8_", "F6_", "F4"))
        is_code |= ref.dtype == "U32" and ref.name.endswith(".weight")
        is_matrix = is_code and len(ref.shape) >= 2
        if is_matrix or (_NAMES.search(ref.name) and not leftover(ref.name)):
            sentence = f"the base is stored quantised (this is a tensor of {ref.dtype}), but its configuration does not say how"
            return [error("unsupported", ref.name, sentence, parent_hint(config))]
    return []

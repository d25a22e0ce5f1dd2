"""FP8 of FBGEMM: a scale for each row of a linear layer, for each column of a stack of experts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_merge.quantised.draft import NOTHING, Draft, Wanted, codes_of, grid, storage
from lora_merge.quantised.exceptions import Exceptions
from lora_merge.quantised.fp8 import row_shapes
from lora_merge.quantised.tables import settings_of, table_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.tensor import TensorRef
    from lora_merge.quantised.method import Found, Surroundings

_ORPHANS = re.compile(r"\.weight_scale$|_proj_scale$")


class Fbgemm:
    """``quant_method`` fbgemm_fp8. Source: transformers 5.23 ``FbgemmFp8Linear`` and ``FbgemmFp8Llama4TextExperts``."""

    def identify(self, tensors: Mapping[str, TensorRef], around: Surroundings) -> Found:
        """Return the weights that are stored so."""
        table = table_of(settings_of(around.config, around.side), "fbgemm_fp8")
        if table is None:
            return NOTHING
        draft = Draft(tensors, table)
        for ref in list(tensors.values()):
            if ref.dtype == "F8_E4M3" and len(ref.shape) >= 2:
                _add(draft, ref)
        field = "modules_to_not_convert"
        exceptions = Exceptions(field, table.values.get(field), "names", around)
        return draft.done(exceptions, _ORPHANS, "a weight in FP8")


def _add(draft: Draft, ref: TensorRef) -> None:
    # A stack of experts is [experts, in, out], so its scales are those of columns.
    is_linear = ref.name.endswith(".weight")
    rows, columns = (1, 0) if is_linear else (0, 1)
    shapes = row_shapes(ref.shape) if is_linear else (grid(ref.shape, 0, 1),)
    name = f"{ref.name.removesuffix('weight')}weight_scale" if is_linear else f"{ref.name}_scale"
    how = storage("scaled", ref.dtype, codes=ref.dtype, block_rows=rows, block_columns=columns, scale="F32")
    draft.add(
        ref.name,
        ref.shape,
        how,
        [codes_of(ref.name, ref.dtype, ref.shape), Wanted("scale", name, ("F32",), shapes)],
    )

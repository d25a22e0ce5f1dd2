"""AWQ: eight codes of four bits in a word, across the outputs, a scale and a zero for each group of inputs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_merge.core.report import error
from lora_merge.core.tensor import shape_text
from lora_merge.quantised.draft import AGAIN, CODE, NOTHING, Draft, Wanted, codes_of, number, storage
from lora_merge.quantised.exceptions import Exceptions
from lora_merge.quantised.tables import settings_of, table_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.tensor import TensorRef
    from lora_merge.quantised.method import Found, Surroundings

_CODES = ".qweight"
_ORPHANS = re.compile(r"\.(qzeros|scales)$")


class Awq:
    """``quant_method`` awq, version gemm. Source: AutoAWQ ``WQLinear_GEMM``, GPTQModel 7.7 ``AwqTorchQuantLinear``."""

    def identify(self, tensors: Mapping[str, TensorRef], around: Surroundings) -> Found:
        """Return the weights that are stored so."""
        table = table_of(settings_of(around.config, around.side), "awq")
        if table is None:
            return NOTHING
        draft = Draft(tensors, table)
        group = number(table.values, "group_size", "q_group_size")
        for ref in list(tensors.values()):
            if ref.name.endswith(_CODES):
                # AutoAWQ's default is 128; -1 is one group for the whole line.
                _add(draft, ref, 128 if group is None else max(group, 0))
        field = "modules_to_not_convert"
        exceptions = Exceptions(field, table.values.get(field), "names", around)
        return draft.done(exceptions, _ORPHANS, "qweight")


def _add(draft: Draft, codes: TensorRef, group: int) -> None:
    if len(codes.shape) != 2:
        sentence = f"has shape {shape_text(codes.shape)}, expected (in, out / 8)"
        draft.refuse(error(CODE, codes.name, sentence, AGAIN), [codes])
        return
    module = codes.name.removesuffix(_CODES)
    n_in, words = codes.shape
    groups = -(-n_in // group) if group else 1
    scale = draft.tensors.get(f"{module}.scales")
    how = storage("awq", codes.dtype, group=group, scale=scale.dtype if scale is not None else "F16")
    wanted = [
        codes_of(codes.name, "I32", codes.shape),
        Wanted("scale", f"{module}.scales", ("F16", "BF16", "F32"), ((groups, words * 8),)),
        Wanted("zero", f"{module}.qzeros", ("I32",), ((groups, words),)),
    ]
    draft.add(f"{module}.weight", (words * 8, n_in), how, wanted)

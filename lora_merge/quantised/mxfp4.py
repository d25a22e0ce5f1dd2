"""MXFP4 of gpt-oss: stacks of experts in codes of four bits, with a power of two for each 32."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_merge.core.report import error
from lora_merge.core.tensor import shape_text
from lora_merge.quantised.draft import AGAIN, CODE, NOTHING, Draft, Wanted, codes_of, storage
from lora_merge.quantised.exceptions import Exceptions
from lora_merge.quantised.tables import settings_of, table_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.tensor import TensorRef
    from lora_merge.quantised.method import Found, Surroundings

_CODES = "_blocks"
_ORPHANS = re.compile(r"_(blocks|scales)$")


class Mxfp4:
    """``quant_method`` mxfp4. Source: transformers 5.23 ``Mxfp4GptOssExperts``.

    ``P_blocks`` is U8 ``[experts, out, in / 32, 16]`` and ``P_scales`` U8 ``[experts, out, in / 32]``; the parameter P is
    ``[experts, in, out]``.
    """

    def identify(self, tensors: Mapping[str, TensorRef], around: Surroundings) -> Found:
        """Return the weights that are stored so."""
        table = table_of(settings_of(around.config, around.side), "mxfp4")
        if table is None:
            return NOTHING
        draft = Draft(tensors, table)
        for ref in list(tensors.values()):
            if ref.name.endswith(_CODES):
                _add(draft, ref)
        field = "modules_to_not_convert"
        exceptions = Exceptions(field, table.values.get(field), "names", around)
        return draft.done(exceptions, _ORPHANS, "a tensor of blocks")


def _add(draft: Draft, ref: TensorRef) -> None:
    name = ref.name.removesuffix(_CODES)
    if len(ref.shape) != 4 or ref.shape[3] != 16:
        sentence = f"has shape {shape_text(ref.shape)}, expected (experts, out, in / 32, 16)"
        draft.refuse(error(CODE, ref.name, sentence, AGAIN), [ref])
        return
    experts, rows, groups, _ = ref.shape
    scale = Wanted("scale", f"{name}_scales", ("U8", "F8_E8M0"), ((experts, rows, groups),))
    how = storage("mxfp4_experts", ref.dtype)
    draft.add(name, (experts, groups * 32, rows), how, [codes_of(ref.name, "U8", ref.shape), scale])

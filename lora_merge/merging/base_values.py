"""Which tensors of a base made NaN or infinity of a merge: scales or values that are not finite themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.plan import Merge
from lora_merge.core.report import error
from lora_merge.core.tensor import TORCH_NAMES
from lora_merge.core.weight import WEIGHT
from lora_merge.errors import PlanError
from lora_merge.formats.safetensors import is_finite, is_zero

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lora_merge.core.plan import MergePlan
    from lora_merge.core.report import Issue
    from lora_merge.core.tensor import TensorRecord, TensorRef
    from lora_merge.core.weight import Weight

_HINT = "download the base again, or pass another copy of it with --base"
_SMALL_FLOATS = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0"})


def check_base(records: Iterable[TensorRecord], plan: MergePlan) -> None:
    """Check that merged values that are not finite were not so in the base. The base is read only where there are such values.

    Args:
        records: of the tensors that were written.
        plan: how they were made.

    Raises:
        PlanError: tensors of the base hold NaN or infinity.
        CheckpointError: the base cannot be read.
    """
    odd = {record.name for record in records if not record.finite}
    found = [
        issue
        for step in plan.steps
        if isinstance(step.op, Merge) and not odd.isdisjoint(slot.name for slot in step.slots)
        for issue in _odd_parts(step.op.source)
    ]
    if found:
        raise PlanError(found)


def _odd_parts(weight: Weight) -> Iterator[Issue]:
    """Yield an issue for each tensor of a weight whose numbers cannot be computed with."""
    settings = dict(weight.storage.settings)
    for role, ref in weight.parts.items():
        is_codes = role == WEIGHT and not weight.storage.is_dense
        floats = _floats_of(role, ref, str(settings.get("scale", "")), is_codes=is_codes)
        if floats and not is_finite(ref, floats):
            yield error(
                "non-finite", ref.name, "holds NaN or infinity in the base, expected finite numbers", _HINT
            )
        elif role == "global" and is_zero(ref):
            yield error("non-finite", ref.name, "is 0 in the base, expected a positive scale", _HINT)


def _floats_of(role: str, ref: TensorRef, scale: str, *, is_codes: bool) -> str:
    """Return the dtype of the numbers that a part holds; empty for integers."""
    if ref.dtype in _SMALL_FLOATS:
        return ref.dtype
    if ref.dtype in TORCH_NAMES:
        # bitsandbytes may keep its codes under such a dtype.
        return "" if is_codes else ref.dtype
    # Powers of two, and MLX's other scales, are stored as plain bytes.
    is_byte = role == "scale" and ref.dtype == "U8"
    return ("F8_E4M3" if scale.endswith("E4M3") else "F8_E8M0") if is_byte else ""

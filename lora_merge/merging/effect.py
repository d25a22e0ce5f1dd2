"""Does an output differ from the base? Checked before it is published."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.core.report import error
from lora_merge.errors import PlanError
from lora_merge.formats.safetensors import same_values
from lora_merge.planning.effect import is_reshaped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lora_merge.core.tensor import Survival
    from lora_merge.planning.run import Planned


def check_effect(planned: Planned, file_of: Callable[[str], str], survival: Mapping[str, Survival]) -> None:
    """Check that at least one tensor of an output differs from the base's, in the dtype that it is stored in.

    The base is read again only where nothing was seen to change in the rows that were looked at.

    Args:
        planned: the merge.
        file_of: returns the text that names a weight file of the output.
        survival: what became of each delta, where that was looked at.

    Raises:
        PlanError: no tensor differs.
    """
    plan = planned.plan
    # The rows that were sampled while merging settle nearly every merge, without reading anything.
    if is_reshaped(plan) or any(one.unchanged < 1 and one.delta_norm for one in survival.values()):
        return
    base = planned.checkpoint.parameters()
    for step in plan.steps:
        if step.action in {"copied", "cast"}:
            continue
        before = base.get(step.name)
        # A tensor that the base does not have, or stores in other parts, is a difference.
        if before is None or before.parts.keys() != step.writes.keys():
            return
        # The sampled rows showed no change, but others may have one: compare every byte.
        for role, slot in step.writes.items():
            if not same_values(replace(slot, file=file_of(slot.file)), before.parts[role]):
                return
    # A delta that is not zero and left no trace was lost by rounding; otherwise the adapter itself does
    # nothing.
    if any(one.delta_norm for one in survival.values()):
        sentence = "every change is too small for the stored dtype and was rounded away, so the output equals the base"
        hint = "pass --dtype float32, which keeps changes of any size"
    else:
        sentence = "the merge changes no value, so the output would equal the base"
        hint = "check that this is the adapter you want, and that its training ran"
    raise PlanError([error("no-effect", ", ".join(plan.adapters), sentence, hint)])

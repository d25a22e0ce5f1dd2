"""Does an output hold the tensors that a new plan promises, wherever they are stored in it?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.core.report import error
from lora_merge.core.tensor import shape_text

if TYPE_CHECKING:
    from lora_merge.core.plan import MergePlan, Step
    from lora_merge.core.report import Issue
    from lora_merge.core.tensor import TensorRef
    from lora_merge.formats.written_checkpoint import Output


def placed(plan: MergePlan, output: Output) -> tuple[MergePlan, list[Issue]]:
    """Return the plan with its slots at the places where the tensors were found, and an issue for each tensor that
    was not.

    An output can be checked against its plan whatever its shards are. Steps that lack a tensor are left out of the
    plan.
    """
    found = {ref.name: replace(ref, file=name) for name, file in output.files.items() for ref in file.tensors}
    steps: list[Step] = []
    issues: list[Issue] = []
    for step in plan.steps:
        writes: dict[str, TensorRef] = {}
        for role, slot in step.writes.items():
            ref = found.pop(slot.name, None)
            if ref is None:
                sentence = "is in no file, expected from base and adapter"
                issues.append(error("missing-tensor", slot.name, sentence))
            elif (ref.dtype, ref.shape) != (slot.dtype, slot.shape):
                got, wanted = f"{ref.dtype} {shape_text(ref.shape)}", f"{slot.dtype} {shape_text(slot.shape)}"
                issues.append(
                    error("wrong-tensor", slot.name, f"is {got}, expected {wanted} from base and adapter")
                )
            else:
                writes[role] = ref
        if writes.keys() == step.writes.keys():
            steps.append(replace(step, writes=writes))
    for name, ref in found.items():
        issues.append(
            error("extra-tensor", name, f"is in {ref.file}, but is not expected from base and adapter")
        )
    return replace(plan, steps=tuple(steps)), issues

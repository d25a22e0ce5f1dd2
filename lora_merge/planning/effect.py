"""Merges and adapters that would change nothing: an output equal to the base is refused, with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.plan import Merge
from lora_merge.core.report import Issue, error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.adapter import AdapterUse
    from lora_merge.core.plan import MergePlan

_OF_STORAGE = ("dtype", "quantization_config", "compression_config", "quantization")
"""Ends of keys of ``config.json`` that say how weights are stored."""

_CHECK = "check that this is the adapter you want, and that its training ran"


def effect_issues(plan: MergePlan, uses: Sequence[AdapterUse]) -> list[Issue]:
    """Return an error for each adapter without effect, or one for a plan that changes nothing at all."""
    # What only the merge can tell (PEFT's own layers, a dtype that is too coarse) is checked when tensors are
    # written.
    issues = [error("no-effect", use.adapter.root, *_why(use)) for use in uses if use.is_idle]
    if not issues and not is_reshaped(plan) and not _changes(plan):
        sentence = "the adapter changes nothing in the base, so the output would be a copy of the base"
        issues.append(error("no-effect", ", ".join(plan.adapters), sentence, _CHECK))
    return issues


def is_reshaped(plan: MergePlan) -> bool:
    """Return True when the output's config differs from the base's in more than how weights are stored: in layers, rows, a
    tie.
    """
    return any(not key.endswith(_OF_STORAGE) for key in plan.config_patch.set)


def _why(use: AdapterUse) -> tuple[str, str]:
    """Return why every delta of an adapter is zero, and what to do."""
    deltas = use.adapter.deltas
    if deltas and not any(delta.scale for delta in deltas):
        sentence = "scales every change by 0, so merging it changes nothing"
        return (
            sentence,
            "set lora_alpha and alpha_pattern in adapter_config.json to the values of the training",
        )
    sentence = (
        f"has no effect: lora_A or lora_B is all zeros in each of its {len(use.adapter.modules)} modules"
    )
    return sentence, f"lora_B is zero until training changes it, so {_CHECK}"


def _changes(plan: MergePlan) -> bool:
    """Return True when a plan merges a delta or copies a tensor of an adapter."""
    return any(step.replaced or (isinstance(step.op, Merge) and step.op.deltas) for step in plan.steps)

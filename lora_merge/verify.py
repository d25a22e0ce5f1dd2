"""A plan and an output on disk → a verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lora_merge.checks import CHECKS, Evidence
from lora_merge.checks.recompute import has_formula, sampled_rows
from lora_merge.checks.structure import structure
from lora_merge.core.plan import Merge
from lora_merge.core.report import Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_merge.core.plan import MergePlan
    from lora_merge.core.report import Issue
    from lora_merge.core.tensor import TensorRecord


def verify(
    plan: MergePlan, root: Path, records: Sequence[TensorRecord], level: Literal["sample", "full"]
) -> Verdict:
    """Return what every check says about an output.

    Args:
        plan: what was promised.
        root: the directory to look at.
        records: what writing returned.
        level: ``sample`` recomputes three rows of each merged tensor, ``full`` every value.
    """
    evidence = Evidence(plan, root, tuple(records), level)
    issues: list[Issue] = []
    for check in CHECKS.values():
        issues += check(evidence)
        if check is structure and issues:  # the others presuppose the files that it misses
            return Verdict(level, len(plan.steps), 0, tuple(issues))
    n_rows = sum(
        len(rows)
        for step in plan.steps
        if isinstance(step.op, Merge) and has_formula(step.op)
        for rows in sampled_rows(step.slots[0], step.op, level)
    )
    return Verdict(level, n_tensors=len(plan.steps), n_rows=n_rows, issues=tuple(issues))

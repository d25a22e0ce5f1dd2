"""A plan and an output on the disk → a verdict: all checks are run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

from lora_merge.checks import CHECKS, Evidence
from lora_merge.checks.choosing import chosen_rows
from lora_merge.checks.evidence import HERE
from lora_merge.checks.structure import structure
from lora_merge.core.report import Verdict
from lora_merge.executors.crew import Crew

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lora_merge.checks.evidence import Elsewhere
    from lora_merge.core.plan import MergePlan
    from lora_merge.core.tensor import TensorRecord


def verify(
    plan: MergePlan,
    root: Path,
    records: Sequence[TensorRecord],
    level: Literal["sample", "full"],
    sealed: Mapping[str, str] | None = None,
    elsewhere: Elsewhere = HERE,
    crew: Crew | None = None,
) -> Verdict:
    """Run every check on an output, and return the verdict.

    Args:
        plan: what was promised.
        root: the directory to look at.
        records: what writing returned.
        level: ``sample`` recomputes the rows that projections suspect, some of each merged tensor and all of small ones;
            ``full`` recomputes every value.
        sealed: digests of the files around the weights, as they were meant to be.
        elsewhere: where the weight files are, if not in ``root``.
        crew: the threads that look at tensors; it ends with this. Default: this thread.
    """
    evidence = Evidence(
        plan, root, tuple(records), level, sealed or {}, elsewhere=elsewhere, crew=crew or Crew(1)
    )
    issues = list(structure(evidence))
    if issues:  # the others presuppose the files that it misses
        return Verdict(level, len(plan.steps), 0, tuple(issues))
    others = [check for check in CHECKS.values() if check is not structure]
    # Most of their time they wait, each for something else: a tokenizer that loads, rows or blocks that the disk reads. The crew
    # ends first: then they end too, and an interrupt is not kept waiting for them.
    with ThreadPoolExecutor(len(others)) as pool, evidence.crew:
        for found in pool.map(lambda check: list(check(evidence)), others):
            issues += found
    return Verdict(
        level,
        n_tensors=len(plan.steps),
        n_rows=chosen_rows(evidence).n_rows,
        issues=tuple(issues),
        n_projected=evidence.n_projected,
    )

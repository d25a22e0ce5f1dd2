"""Outputs without a manifest: how their weights are stored, and how they were rounded."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from lora_merge.checks import CHECKS
from lora_merge.checks.placed import placed
from lora_merge.core.plan import Copy
from lora_merge.core.report import error
from lora_merge.errors import PlanError, RequestError
from lora_merge.planning import make_plan
from lora_merge.words import counted

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from lora_merge.checks import Evidence
    from lora_merge.core.plan import MergePlan
    from lora_merge.core.report import Issue
    from lora_merge.formats.manifest import Manifest
    from lora_merge.formats.written_checkpoint import Output
    from lora_merge.planning import Joined, Policy
    from lora_merge.requests.choices import OutputStorage, RoundingMethod

_STORAGES: Final[tuple[OutputStorage, ...]] = ("base", "mixed")
"""How the weights of a quantised base may be stored, other than the default."""

_ROUNDINGS: Final[tuple[RoundingMethod, ...]] = ("nearest", "stochastic", "adapter")
"""In the order of how many values each can explain: the first that explains an output is the one to name."""

_OF_ROUNDING = frozenset({"wrong-value", "effect-lost"})
"""Codes of errors that another rounding may explain."""

_MOST_ASKED = 8
"""Wrong tensors that are compared with the other roundings: one rounding was used for all of them."""


def check_rounding(asked: RoundingMethod | None, manifest: Manifest) -> None:
    """Check that a request does not contradict the manifest.

    Raises:
        RequestError: the manifest says another rounding.
    """
    default = "adapter" if manifest.options.get("out_storage") == "base" else "nearest"
    recorded = manifest.options.get("rounding") or default
    if asked is not None and asked != recorded:
        sentence = f"is {asked}, but the manifest of the output says {recorded}"
        hint = "leave out --rounding: the manifest says how the output was rounded"
        raise RequestError("", 0, "rounding", sentence, hint=hint)


def plan_as_stored(
    joined: Joined, plan: MergePlan, policy: Policy, output: Output
) -> tuple[MergePlan, Policy]:
    """Return the plan, and the policy, whose tensors are most like those of an output: of a quantised base they may be
    stored in several ways.

    Args:
        joined: base and adapters.
        plan: by the default.
        policy: the default.
        output: what is verified.
    """
    best, least = (plan, policy), len(placed(plan, output)[1])
    for storage in _STORAGES if least and joined.base.quantisation else ():
        other = replace(policy, out_storage=storage)
        try:
            found = make_plan(joined, other)
        except PlanError:
            continue
        if (n_wrong := len(placed(found, output)[1])) < least:
            best, least = (found, other), n_wrong
    return best


def other_rounding(
    joined: Joined, policy: Policy, evidence: Evidence, wrong: Sequence[Issue]
) -> Iterator[Issue]:
    """Yield an error that names the rounding that explains most of the tensors that are wrong, if there is one.

    Args:
        joined: base and adapters.
        policy: by which the values were compared.
        evidence: the same.
        wrong: what the comparison found.
    """
    names = {issue.subject for issue in wrong if issue.code in _OF_ROUNDING}
    asked = sorted(names)[:_MOST_ASKED]
    for rounding in _ROUNDINGS if asked else ():
        try:
            plan = make_plan(joined, replace(policy, rounding=rounding))
        except PlanError:
            continue
        n_other, again = _rounded_otherwise(plan, evidence, asked)
        # Of a few wrong tensors among many the rounding is not the reason. Only the nearest numbers leave no choice.
        if not n_other or (rounding != "nearest" and 2 * len(names) < n_other):
            continue
        left = {issue.subject for issue in CHECKS["recompute"](again) if issue.severity == "error"}
        if 2 * len(left) < len(asked):
            how_many = counted(len(asked) - len(left), "tensor")
            sentence = f"the values are within what --rounding {rounding} may write ({how_many} compared)"
            hint = f"pass --rounding {rounding} if the merge used it; if not, merge again"
            yield error("other-rounding", "", sentence, hint)
            return


def _rounded_otherwise(plan: MergePlan, evidence: Evidence, asked: Collection[str]) -> tuple[int, Evidence]:
    """Return how many tensors another plan makes otherwise, and the evidence of those that are asked for.

    Copies stay: they may be the scales of what is compared.
    """
    before = {step.name: step for step in evidence.plan.steps}
    steps = [replace(step, writes=before[step.name].writes) for step in plan.steps if step.name in before]
    n_other = sum(step.op != before[step.name].op for step in steps)
    left = tuple(step for step in steps if step.name in asked or isinstance(step.op, Copy))
    return n_other, replace(evidence, plan=replace(plan, steps=left))

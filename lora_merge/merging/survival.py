"""How much of the adapters' change an output has: what is said of it, and what is refused."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from lora_merge.core.plan import Merge
from lora_merge.core.report import Issue, error, note, warning
from lora_merge.deltas import keeps_effect
from lora_merge.errors import PlanError
from lora_merge.quantised import describe
from lora_merge.words import counted, listing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.plan import MergePlan
    from lora_merge.core.tensor import Survival

DROWNED_SHARE = 0.25
"""Share of a delta's elements that may be lost to rounding before a warning says so."""

SATURATED_SHARE = 0.05
"""With more of its values beyond the grid, a tensor loses its change to that."""

KEPT_SHARE = 0.9
"""Share of the change that should arrive where a few values of a coarse grid carry what the others cannot."""

LEAST_SHARE = 0.5
"""Less of the change than this does not count as a merge of the adapter, unless the user wants it."""


def kept_of(survival: Mapping[str, Survival]) -> float:
    """Return the share of all changes that arrived, each tensor weighed by the squared length of its change; 1 without a
    change. What arrived is known of a sample of each, the length of the whole where the effect was kept account of.
    """
    changed = [one for one in survival.values() if one.delta_norm]
    is_whole = all(one.effect_norm > 0 for one in changed)
    weights = [(one.effect_norm if is_whole else one.delta_norm) ** 2 for one in changed]
    total = sum(weights)
    arrived = sum(one.kept * weight for one, weight in zip(changed, weights, strict=True))
    return arrived / total if total else 1.0


def effect_error_of(survival: Mapping[str, Survival]) -> float | None:
    """Return the error of the adapters' effect on what they see of their inputs, relative to that effect, over all tensors
    for which it is known; None where it is for none.
    """
    known = [one for one in survival.values() if one.effect_norm > 0]
    if not known:
        return None
    return math.sqrt(sum(one.effect_error**2 for one in known) / sum(one.effect_norm**2 for one in known))


def survival_issues(survival: Mapping[str, Survival], plan: MergePlan) -> tuple[Issue, ...]:
    """Return what is worth knowing of the change that arrived: a warning where too little did, or where there was none.

    Args:
        survival: of the merged tensors.
        plan: how each was to be stored.
    """
    # Nothing was lost to rounding here: the deltas themselves are zero, which asks for another sentence.
    if survival and not any(kept.delta_norm for kept in survival.values()):
        sentence = f"no weight changes: in a sample of {counted(len(survival), 'merged tensor')}, every delta is zero"
        hint = "check that this is the right adapter: LoRA's B is zero until it is trained"
        return (warning("no-effect", "", sentence, hint),)
    ops = _merges(plan)
    plain = {
        name: kept
        for name, kept in survival.items()
        if ops[name].rounding is None and ops[name].target.is_dense
    }
    others = {name: kept for name, kept in survival.items() if name not in plain}
    return (*_drowned(plain, len(survival)), *_of_grids(others, ops))


def _drowned(plain: Mapping[str, Survival], n_all: int) -> tuple[Issue, ...]:
    """Return a warning where a plain dtype is too coarse for deltas that are rounded to the nearest."""
    # bfloat16 keeps 8 bits: of a delta of 1e-4 on weights of 0.02, a third of the elements change nothing.
    drowned = {name: kept for name, kept in plain.items() if kept.unchanged > DROWNED_SHARE}
    if not drowned:
        return ()
    name, worst = max(drowned.items(), key=lambda item: item[1].unchanged)
    sentence = (
        f"{worst.unchanged:.0%} of the delta's elements are too small for the stored dtype and change nothing "
        f"(‖Δ‖/‖W‖ is {worst.relative:.1e}, {worst.kept:.0%} of Δ is kept); "
        f"{len(drowned)} of {counted(n_all, 'merged tensor')} lose more than {DROWNED_SHARE:.0%}"
    )
    hint = "pass --rounding adapter to keep the adapter's effect, or --dtype float32 or float16 to keep more digits"
    return (warning("delta-drowns", name, sentence, hint),)


def _of_grids(survival: Mapping[str, Survival], ops: Mapping[str, Merge]) -> tuple[Issue, ...]:
    """Return a note on what other roundings and coarser grids kept; a warning if it is too little."""
    if not any(kept.delta_norm for kept in survival.values()):
        return ()
    kept, off = kept_of(survival), effect_error_of(survival)
    words = f"{_how(survival, ops)} keeps about {kept:.1%} of the adapter's change"
    if off is not None:
        words += f"; the error of the adapter's effect is {off:.1%}"
    saturated = max(one.saturated for one in survival.values())
    # Less would be printed as 0.0 %.
    if saturated >= 5e-4:
        words += f"; up to {saturated:.1%} of the values of a tensor are outside its grid"
    name, worst = min(survival.items(), key=lambda item: item[1].kept)
    if kept >= KEPT_SHARE and (off is None or off <= LEAST_SHARE):
        lost = sum(one.kept < LEAST_SHARE for one in survival.values())
        if lost:
            words += (
                f"; {lost} of {counted(len(survival), 'tensor')} whose change is small {'keeps' if lost == 1 else 'keep'} "
                f"less than half of it, this one {max(worst.kept, 0.0):.0%}"
            )
        return (note("rounding", name if lost else "", words),)
    if kept < KEPT_SHARE:
        words += f"; this tensor keeps the least, {max(worst.kept, 0.0):.0%}"
    return (warning("delta-drowns", name, words, _cure(ops[name])),)


def check_loss(survival: Mapping[str, Survival], plan: MergePlan, *, is_allowed: bool) -> None:
    """Refuse an output that has lost more than half of the adapters' change to rounding.

    Args:
        survival: of the merged tensors.
        plan: how each was to be stored.
        is_allowed: the user wants it anyway.

    Raises:
        PlanError: it has.
    """
    kept = kept_of(survival)
    if is_allowed or kept >= LEAST_SHARE:
        return
    ops = _merges(plan)
    name = min(survival, key=lambda one: survival[one].kept)
    why = "the change is too small for how the weights are stored"
    if survival[name].saturated > SATURATED_SHARE:
        why = f"the change is too large: {survival[name].saturated:.0%} of the values are beyond the range of its scales"
    sentence = (
        f"{_how(survival, ops)} keeps about {max(kept, 0.0):.0%} of the adapter's change, expected at least {LEAST_SHARE:.0%}; "
        f"this tensor keeps {max(survival[name].kept, 0.0):.0%}: {why}"
    )
    hint = f"{_cure(ops[name])}, or --allow-loss to write the output anyway"
    raise PlanError([error("delta-lost", name, sentence, hint)])


def _merges(plan: MergePlan) -> dict[str, Merge]:
    """Return what is done to each merged tensor, by its name in the output."""
    return {step.main.name: step.op for step in plan.steps if isinstance(step.op, Merge)}


def _how(survival: Mapping[str, Survival], ops: Mapping[str, Merge]) -> str:
    """Return how most tensors were rounded, and to what, in words."""
    methods = Counter(_method(ops[name]) for name in survival)
    storages = Counter(describe(ops[name].target) for name in survival)
    method = {"nearest": "to the nearest", "adapter": "for the adapter", "stochastic": "at random"}
    return f"rounding {method[methods.most_common(1)[0][0]]} ({listing([one for one, _ in storages.most_common()], 2)})"


def _method(op: Merge) -> str:
    return "nearest" if op.rounding is None else op.rounding.method


def _cure(op: Merge) -> str:
    """Return what keeps more of the change."""
    cures = []
    if _method(op) != "adapter" and any(map(keeps_effect, op.deltas)):
        cures.append("--rounding adapter to keep the adapter's effect")
    if op.on_stored_grid:
        cures.append("--out-storage mixed to store the changed weights in full precision")
    elif op.target.is_dense:
        cures.append("--dtype float32 or float16 to keep more digits")
    return f"pass {', or '.join(cures)}" if cures else "leave out --quantize, or choose a finer scheme"

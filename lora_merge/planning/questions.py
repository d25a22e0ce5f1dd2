"""What only a merge asks of a join: what it refuses, and what it warns of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.report import Issue, error, note, warning
from lora_merge.deltas import keeps_effect
from lora_merge.planning.ties import UNTIED, untie_refusal
from lora_merge.words import of_several

if TYPE_CHECKING:
    from lora_merge.planning.joined import Joined
    from lora_merge.planning.settings import Policy


def merged_before(joined: Joined, policy: Policy) -> list[Issue]:
    """Return an error for each adapter that is merged into the base already, by the base's own manifest."""
    if policy.allow_again:
        return []
    # By digest: a path may have changed, or may hold another adapter by now.
    paths = {before.digest: before.path for before in joined.base.merged}
    hint = "merge into the base that this one was made from, or pass --allow-again"
    return [
        error(
            "merged-before",
            use.adapter.root,
            (
                f"the base already contains this adapter (merged as {paths[use.adapter.digest]}, according to "
                "its merge_manifest.json)"
            ),
            hint,
        )
        for use in joined.uses
        if use.adapter.digest in paths
    ]


def given_twice(joined: Joined) -> list[Issue]:
    """Return a note for each adapter that is among the adapters more than once: its change is added each time."""
    roots: dict[str, list[str]] = {}
    for use in joined.uses:
        roots.setdefault(use.adapter.digest, []).append(use.adapter.root)
    why = "times, and its change is added each time; leave out all but one if that is not meant"
    return [
        note("given-twice", " = ".join(dict.fromkeys(found)), f"is given {len(found)} {why}")
        for found in roots.values()
        if len(found) > 1
    ]


def judged(joined: Joined, policy: Policy) -> list[Issue]:
    """Return the issues of the fit; the note on an untied pair becomes an error where that is not allowed."""
    issues = list(joined.issues_of_fit)
    if joined.tie is None or not joined.is_untied or policy.allow_untie:
        return issues
    refusal = untie_refusal(joined.base.config, joined.tie)
    return [refusal if refusal and issue.code == UNTIED else issue for issue in issues]


def storing_issues(joined: Joined, policy: Policy) -> list[Issue]:
    """Return issues about how the output is to be stored and rounded."""
    issues = []
    if policy.quantize is not None and policy.out_storage is not None:
        sentence = (
            f"--quantize {policy.quantize} and --out-storage {policy.out_storage} both say how the weights "
            "are stored"
        )
        issues.append(error("contradiction", "", sentence, "pass only one of the two"))
    is_plain = all(weight.storage.is_dense for weight in joined.outline.sources.values())
    if policy.out_storage == "base" and is_plain:
        sentence = (
            "is base, and the base has no quantised weights: the output is stored as the base is in any case"
        )
        issues.append(
            warning(
                "unused-option",
                "out_storage",
                sentence,
                "leave it out",
            )
        )
    deltas = [delta for change in joined.changes.values() for delta in change.deltas]
    if policy.rounding == "adapter" and not any(map(keeps_effect, deltas)):
        sentence = (
            "is adapter, which keeps the effect of LoRA's A and B, and there is no LoRA here: values are "
            "rounded to the nearest"
        )
        issues.append(warning("unused-option", "rounding", sentence, "leave it out, or use stochastic"))
    return issues


def combining_issues(joined: Joined, policy: Policy) -> list[Issue]:
    """Return issues about changes that become one: of several adapters, or by the method that ``combine`` names."""
    if policy.combine == "linear":
        return _in_turn(joined)
    return [*(_rankless(joined) if policy.combine == "svd" else ()), *_in_parts(joined, policy)]


def _in_turn(joined: Joined) -> list[Issue]:
    """Return a note when the order of the adapters matters."""
    names = [
        name
        for name, change in joined.changes.items()
        if len({delta.adapter for delta in change.deltas}) > 1
        # Sums add up in any order.
        and not all(delta.facts.is_sum for delta in change.deltas)
    ]
    if not names:
        return []
    why = (
        "changed by several adapters, and not all of them are additive (DoRA, trained rows, PEFT's own "
        "layers), so their order matters; they were applied in the order given"
    )
    sentence = of_several(len(names), f"is {why}", f"are {why}")
    return [note("in-turn", min(names), sentence)]


def _in_parts(joined: Joined, policy: Policy) -> list[Issue]:
    """Return a warning when a combination takes a stored tensor as one weight, and it holds several of the adapters'."""
    names = [
        name
        for name, change in joined.changes.items()
        if any(delta.region.box or delta.facts.is_stacked for delta in change.deltas)
    ]
    if not names:
        return []
    why = (
        f"several weights (experts, fused projections) that --combine {policy.combine} treats as one; a base "
        "that stores them separately would give another result"
    )
    sentence = of_several(len(names), f"holds {why}", f"hold {why}")
    hint = "use --combine linear, which gives the same result for both"
    return [warning("combined-whole", min(names), sentence, hint)]


def _rankless(joined: Joined) -> list[Issue]:
    """Return an error for each weight for which ``--combine svd`` has no rank to keep."""
    sentence = "--combine svd keeps the largest rank of the adapters, and no adapter that changes this weight has a rank"
    return [
        error("no-rank", name, sentence, "use --combine linear, ties or dare")
        for name, change in joined.changes.items()
        if change.deltas and len(joined.shape(name)) > 1 and max(delta.rank for delta in change.deltas) == 0
    ]

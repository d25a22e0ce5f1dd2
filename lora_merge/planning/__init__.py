"""Checkpoint + Adapters → Joined → MergePlan. Pure: opens nothing, and refuses everything at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import ConfigPatch
from lora_merge.core.plan import MergePlan
from lora_merge.core.shards import index_text
from lora_merge.errors import PlanError, UnsupportedError
from lora_merge.planning.draft import join, touches_embeddings
from lora_merge.planning.joined import Joined
from lora_merge.planning.placing import decoded_dtype_patch, dtype_patch, main_dtype, place_all, slots_of
from lora_merge.planning.quantising import targets_of
from lora_merge.planning.questions import combining_issues, given_twice, judged, merged_before, storing_issues
from lora_merge.planning.settings import Policy, Reading
from lora_merge.planning.steps import beyond_float32, with_survey
from lora_merge.planning.stored_otherwise import in_mlx_layout
from lora_merge.planning.storing import DENSE_SHARD, storing_of
from lora_merge.quantised.schemes import SCHEMES
from lora_merge.requests.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.report import Issue
    from lora_merge.planning.storing import Storing

__all__ = [
    "Joined",
    "Policy",
    "Reading",
    "check_fit",
    "join",
    "make_plan",
    "raise_errors",
    "touches_embeddings",
]


def make_plan(joined: Joined, policy: Policy) -> MergePlan:
    """Return the plan of a merge: files with a place for every tensor, the steps that fill them, and what changes
    beside.

    Args:
        joined: what is merged into what.
        policy: how.

    Raises:
        PlanError: adapters and base do not fit, or the policy does not allow what they need; every reason is in ``issues``.
        UnsupportedError: each reason is something that has no merged form.
    """
    base = joined.base
    # In the order in which they are printed. All of them are collected before any is raised.
    issues = [
        *joined.issues_of_base,
        *merged_before(joined, policy),
        *given_twice(joined),
        *joined.issues_of_adapters,
        *judged(joined, policy),
        # A join that ended early has no changes that could be asked about.
        *([*combining_issues(joined, policy), *storing_issues(joined, policy)] if joined.is_whole else ()),
    ]
    raise_errors(issues)
    main = main_dtype(base)
    targets = None
    if policy.quantize is not None:
        targets = targets_of(joined, SCHEMES[policy.quantize], policy.ignore)
        raise_errors(targets.issues)
    storing = storing_of(base, joined.outline, joined.changes, main, policy, targets)
    outline = joined.outline.without(storing.leftovers) if storing.leftovers else joined.outline
    if targets is not None:
        outline = outline.stored_as({name: tuple(one.parts) for name, one in targets.weights.items()})
    slots = slots_of(outline, joined.shapes, storing.storages, targets)
    shard_size = policy.max_shard_size or (DENSE_SHARD if storing.is_plain else None)
    max_shard_bytes = None if shard_size is None else parse_size(shard_size)
    files = place_all(outline, slots, storing.decoded, max_shard_bytes)
    parts = [part for part in outline.parts if part in slots]
    steps = joined.steps_into(files, parts, storing.storages, policy)
    if targets is not None and targets.scheme.is_surveyed:
        steps = with_survey(steps, targets)
    # Scales are known only now: those of several adapters' weights are in the steps.
    raise_errors([*beyond_float32(steps), *(in_mlx_layout(base) if storing.is_plain else ())])
    # A base with an index for its only shard keeps it, unless new shards were asked for.
    indexed = len(files) > 1 or (base.sharded and max_shard_bytes is None)
    return MergePlan(
        base=base.root,
        adapters=tuple(use.adapter.root for use in joined.uses),
        weights=tuple(use.weight for use in joined.uses),
        files=files,
        steps=steps,
        side_files=tuple(file for file in joined.side_files if file.name not in storing.dropped_files),
        config_patch=_config_patch(joined, storing, main, policy),
        index=index_text(files, base.index_metadata) if indexed else "",
        issues=(*issues, *storing.issues, *joined.issues_of_files),
        quantised=storing.numbers,
    )


def _config_patch(joined: Joined, storing: Storing, main: str | None, policy: Policy) -> ConfigPatch:
    """Return what changes in the configuration: dtypes, what the join changes, and how weights are stored."""
    patch: dict[str, Any] = {**dtype_patch(joined.base, main, policy.dtype)}
    if storing.is_plain:
        patch |= decoded_dtype_patch(joined.base, storing.dtype)
    of_storage = storing.config_patch
    return ConfigPatch(
        {**patch, **joined.config_patch, **of_storage.set}, of_storage.delete, of_storage.files
    )


def check_fit(joined: Joined) -> None:
    """Check that adapters and base fit, for verbs that do not merge them.

    Raises:
        PlanError: they do not; UnsupportedError when each reason is something that has no merged form.
    """
    raise_errors(joined.issues)
    raise_errors(beyond_float32(joined.steps))


def raise_errors(issues: Sequence[Issue]) -> None:
    """Raise all errors among some issues as one exception, if there are any.

    Raises:
        PlanError: there are; UnsupportedError when each is of something that has no merged form.
    """
    errors = [issue for issue in issues if issue.severity == "error"]
    if errors:
        unsupported = all(issue.code == "unsupported" for issue in errors)
        raise (UnsupportedError if unsupported else PlanError)(errors)

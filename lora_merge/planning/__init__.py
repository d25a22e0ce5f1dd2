"""Checkpoint + Adapters → Joined → MergePlan. Pure: opens nothing, and refuses everything at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import ConfigPatch
from lora_merge.core.plan import MergePlan
from lora_merge.core.shards import index_text
from lora_merge.errors import PlanError, UnsupportedError
from lora_merge.planning.draft import join, touches_embeddings
from lora_merge.planning.joined import Joined
from lora_merge.planning.placing import dtype_patch, main_dtype, place_all, slots_of, storages_of
from lora_merge.planning.quantised import quantised_config
from lora_merge.planning.questions import combining_issues, judged, merged_before
from lora_merge.planning.settings import Policy, Reading
from lora_merge.planning.steps import beyond_float32
from lora_merge.requests.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.report import Issue

__all__ = [
    "Joined",
    "Policy",
    "Reading",
    "check_fit",
    "join",
    "make_plan",
    "quantised_config",
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
        *joined.issues_of_adapters,
        *judged(joined, policy),
        *(combining_issues(joined, policy) if joined.is_whole else ()),
    ]
    raise_errors(issues)
    main = main_dtype(base)
    storages, cast_issues = storages_of(joined.outline, main, policy.dtype)
    slots = slots_of(joined.outline, joined.shapes, storages)
    max_shard_bytes = None if policy.max_shard_size is None else parse_size(policy.max_shard_size)
    files = place_all(joined.outline, slots, max_shard_bytes)
    steps = joined.steps_into(files, storages, policy)
    # Scales are known only now: those of several adapters' weights are in the steps.
    raise_errors(beyond_float32(steps))
    # A base with an index for its only shard keeps it, unless new shards were asked for.
    indexed = len(files) > 1 or (base.sharded and max_shard_bytes is None)
    return MergePlan(
        base=base.root,
        adapters=tuple(use.adapter.root for use in joined.uses),
        weights=tuple(use.weight for use in joined.uses),
        files=files,
        steps=steps,
        side_files=joined.side_files,
        config_patch=ConfigPatch({**dtype_patch(base, main, policy.dtype), **joined.config_patch}),
        index=index_text(files, base.index_metadata) if indexed else "",
        issues=(*issues, *cast_issues, *joined.issues_of_files),
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

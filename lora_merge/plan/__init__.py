"""Checkpoint + Adapters → MergePlan. Pure: opens nothing, and refuses everything at once."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import CONFIG_FILE, Checkpoint, SideFile, config_levels
from lora_merge.core.plain_config import fetched_part
from lora_merge.core.plan import Merge, MergePlan
from lora_merge.core.report import Issue, error, note, warning
from lora_merge.core.shards import index_text, parse_size
from lora_merge.core.tensor import LARGEST_FLOAT32
from lora_merge.errors import PlanError, UnsupportedError
from lora_merge.plan.draft import Draft, touches_embeddings
from lora_merge.plan.placing import dtype_patch, main_dtype, place_all, slots_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_merge.core.adapter import AdapterUse
    from lora_merge.core.plan import Step
    from lora_merge.requests.request import Request

__all__ = ["make_plan", "quantised_config", "raise_errors", "touches_embeddings"]

_QUANTISED_NAMES = re.compile(
    r"\.(qweight|qzeros|weight_packed|weight_scale|weight_scale_inv|weight_scale_2|SCB|absmax|quant_map"
    r"|weight\.(absmax|quant_map|quant_state\..+))$|_(blocks|scales)$"
)
"""Names that only quantised storages have: GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes, MXFP4."""


def make_plan(
    base: Checkpoint,
    uses: Sequence[AdapterUse],
    request: Request,
    twins: frozenset[frozenset[str]] = frozenset(),
) -> MergePlan:
    """Return the plan of a merge.

    Args:
        base: what to merge into.
        uses: what to merge, in the order in which it is applied.
        request: how; its paths are not looked at.
        twins: pairs of an input and an output embedding with equal values, where base or adapter hold both.

    Raises:
        PlanError: adapters and base do not fit; every reason is in ``issues``.
        UnsupportedError: they may fit, but all that stands in the way has no merged form.
    """
    draft = Draft(base, tuple(uses), request, twins)
    issues = [
        *_quantised(base),
        *_merged_before(base, uses, request),
        *(issue for use in uses for issue in (*use.adapter.issues, *use.issues)),
    ]
    if not all(use.adapter.is_read for use in uses):
        raise_errors(issues)
    issues += draft.join()
    raise_errors(issues)
    main = main_dtype(base)
    slots, cast_issues = slots_of(draft.outline, draft.shapes, main, request.dtype)
    max_shard_bytes = None if request.max_shard_size is None else parse_size(request.max_shard_size)
    files = place_all(draft.outline, slots, max_shard_bytes)
    side_files, side_issues = _side_files(base, uses)
    steps = draft.steps(files)
    raise_errors(_beyond_float32(steps))
    indexed = len(files) > 1 or (base.sharded and max_shard_bytes is None)
    return MergePlan(
        base=base.root,
        adapters=tuple(use.adapter.root for use in uses),
        weights=tuple(use.weight for use in uses),
        files=files,
        steps=steps,
        side_files=side_files,
        config_patch={**dtype_patch(base, main, request.dtype), **draft.config_patch},
        index=index_text(files, base.index_metadata) if indexed else "",
        issues=(
            *issues,
            *cast_issues,
            *side_issues,
            *(note("left-out", "", sentence) for sentence in base.notes),
            *_not_fetched(base.config),
        ),
    )


def raise_errors(issues: Sequence[Issue]) -> None:
    """Raise the errors among some issues, if there are any.

    Raises:
        PlanError: there are; UnsupportedError when each is of something that has no merged form.
    """
    errors = [issue for issue in issues if issue.severity == "error"]
    if errors:
        unsupported = all(issue.code == "unsupported" for issue in errors)
        raise (UnsupportedError if unsupported else PlanError)(errors)


def quantised_config(config: Mapping[str, Any]) -> list[Issue]:
    """Return an issue when a base's configuration says that it is stored quantised."""
    for path, level in config_levels(config):
        settings = level.get("quantization_config")
        if settings:
            method = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else "unnamed"
            subject = f"{path}.quantization_config" if path else "quantization_config"
            sentence = f"the base is stored quantised ({method})"
            return [error("unsupported", subject, sentence, _parent_hint(config))]
    return []


def _beyond_float32(steps: Sequence[Step]) -> list[Issue]:
    """Return an issue for each tensor with a change whose scale, weight included, is too large to multiply by."""
    hint = "look at lora_alpha and at the weights behind the adapters"
    return [
        error(
            "bad-field",
            step.slots[0].name,
            f"has the scale {scale:g}, expected one that float32 can hold",
            hint,
        )
        for step in steps
        if isinstance(step.op, Merge)
        for scale in [
            max((abs(delta.effective_scale * delta.adapter_weight) for delta in step.op.deltas), default=0.0)
        ]
        if not scale <= LARGEST_FLOAT32
    ]


def _quantised(base: Checkpoint) -> list[Issue]:
    """Return an issue when the base is stored quantised."""
    issues = quantised_config(base.config)
    if issues:
        return issues
    for ref in base.tensors():
        low = ref.dtype.startswith(("F8_", "F6_", "F4")) and len(ref.shape) >= 2
        if low or _QUANTISED_NAMES.search(ref.name):
            sentence = f"the base is stored quantised (a {ref.dtype} tensor of this name)"
            return [error("unsupported", ref.name, sentence, _parent_hint(base.config))]
    return []


def _parent_hint(config: Mapping[str, Any]) -> str:
    parent = config.get("_name_or_path")
    return "merge into its full-precision parent: --base PARENT" + (f" (perhaps {parent})" if parent else "")


def _not_fetched(config: Mapping[str, Any]) -> list[Issue]:
    """Return a note when the base has a part that only its name describes, so that its modules are not known."""
    part = fetched_part(config)
    if part is None:
        return []
    sentence = f"{part}; nothing is fetched for it, so modules that the adapter targets and has no tensors for are not found"
    return [note("not-fetched", CONFIG_FILE, sentence)]


def _merged_before(base: Checkpoint, uses: Sequence[AdapterUse], request: Request) -> list[Issue]:
    """Return an issue for each adapter that the base has merged into it already, by its own manifest."""
    if request.allow_again:
        return []
    paths = {before.digest: before.path for before in base.merged}
    hint = "merge into the base that it was made from, or pass --allow-again"
    return [
        error(
            "merged-before",
            use.adapter.root,
            f"is merged into {base.root} already (as {paths[use.adapter.digest]}, by its merge_manifest.json)",
            hint,
        )
        for use in uses
        if use.adapter.digest in paths
    ]


def _side_files(base: Checkpoint, uses: Sequence[AdapterUse]) -> tuple[tuple[SideFile, ...], list[Issue]]:
    """Return the side files of the output: the base's, but for those that an adapter has its own of."""
    files = {file.name: file for file in base.side_files}
    issues: list[Issue] = []
    taken: set[str] = set()
    for use in uses:
        for name in use.displaced & files.keys() - taken:
            del files[name]
        for file in use.adapter.side_files:
            if file.name not in use.own_side_files:
                continue
            if file.name in taken:
                sentence = "comes from several adapters; the last one's is taken"
                issues.append(warning("side-file", file.name, sentence))
            else:
                copy = ", whose copy differs from the base's" if file.name in files else ""
                sentence = f"comes from the adapter{copy}"
                issues.append(note("side-file", file.name, sentence))
            taken.add(file.name)
            files[file.name] = file
    return tuple(sorted(files.values(), key=lambda file: file.name)), issues

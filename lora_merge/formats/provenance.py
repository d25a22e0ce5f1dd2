"""Records where an output came from: the manifest for programs, the model card for people. Pure text.

Neither names a time, a machine or a process, so the same merge writes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.core.adapter import Adapter
from lora_merge.core.checkpoint import MergedBefore
from lora_merge.core.plan import Merge
from lora_merge.formats.markdown import code, name, scalar, strong
from lora_merge.storage.same_model import cached_repo, is_repo
from lora_merge.storage.source import Origin, parse_source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.plan import MergePlan, Step
    from lora_merge.core.tensor import Survival, TensorRecord

MANIFEST_VERSION = 1

_CARD = """\
---
base_model: {base_scalar}
base_model_relation: finetune
library_name: transformers
tags:
- lora-merge
- merged
---

# {title}

The weights of {base} with {adapters} merged into them. A plain Hugging Face checkpoint: it
needs no LoRA support to load.

| | |
| --- | --- |
| base | {base_path}{base_commit} |
{rows}| kind | {kind} |
| tensors | {n_merged} merged, {n_other} as in the base |
| made by | lora-merge {version} |

`merge_manifest.json` beside this file lists every tensor with its digest.
"""


@dataclass(frozen=True, slots=True)
class Provenance:
    """The inputs, options and versions of a merge."""

    base: str
    """The base as the user named it."""

    adapters: tuple[Adapter, ...]
    adapter_paths: tuple[str, ...]
    """The adapters as the user named them."""

    out_name: str
    options: Mapping[str, object]
    versions: Mapping[str, str]
    """Of lora-merge, Python, torch and numpy."""

    base_origin: Origin | None = None
    """The repo and the commit that the base is from; None for a local directory."""

    adapter_origins: tuple[Origin | None, ...] = ()
    """The same of each adapter; empty when all are local directories."""

    merged_before: tuple[MergedBefore, ...] = ()
    """Adapters that the base has merged already, by its own manifest."""


def manifest_text(
    provenance: Provenance, plan: MergePlan, records: Sequence[TensorRecord], digests: Mapping[str, str]
) -> str:
    """Return the text of ``merge_manifest.json``. The same merge gives the same text.

    Args:
        provenance: what the merge was made from.
        plan: what was promised.
        records: what writing returned.
        digests: of the files around the weights, by name.
    """
    origins = {file.name: file.origin for file in plan.side_files}
    by_name = {record.name: record for record in records}
    tensors: dict[str, dict[str, Any]] = {}
    for step in plan.steps:
        for slot in step.slots:
            tensors[slot.name] = {
                "action": step.action,
                "file": slot.file,
                "dtype": slot.dtype,
                "shape": list(slot.shape),
                "digest": by_name[slot.name].digest,
            }
            survival = by_name[slot.name].survival
            if survival is not None:
                tensors[slot.name]["delta"] = {
                    "relative_norm": round(survival.relative, 9),
                    "unchanged_share": round(survival.unchanged, 6),
                    "lost_share": round(survival.lost, 6),
                    **_kept(step, survival),
                }
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        "versions": dict(provenance.versions),
        "base": {"path": provenance.base, **_origin_table(provenance.base_origin), **_history(provenance)},
        "adapters": [
            {
                "path": path,
                **_origin_table(origin),
                "weight": weight,
                "format": adapter.format,
                "digest": adapter.digest,
                # As its reader hands it on: PEFT's fields, whatever the format.
                "config": dict(adapter.config),
            }
            for adapter, path, origin, weight in zip(
                provenance.adapters,
                provenance.adapter_paths,
                _origins(provenance),
                plan.weights,
                strict=True,
            )
        ],
        "options": dict(provenance.options),
        "side_files": {
            name: {"origin": origins.get(name, "lora-merge"), "digest": digest}
            for name, digest in digests.items()
        },
        "tensors": tensors,
    }
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"


def _kept(step: Step, survival: Survival) -> dict[str, float]:
    """Return what rounding kept of a delta; nothing of values that became the nearest number of a plain dtype."""
    op = step.op
    if not isinstance(op, Merge) or (op.rounding is None and op.target.is_dense):
        return {}
    found = {"kept_share": round(survival.kept, 6), "saturated_share": round(survival.saturated, 6)}
    if survival.effect_norm >= 0:
        # Nine digits: verification computes both again.
        found["effect_norm"] = float(f"{survival.effect_norm:.9g}")
        found["effect_error"] = float(f"{survival.effect_error:.9g}")
    return found


def card_text(provenance: Provenance, plan: MergePlan) -> str:
    """Return the text of the model card, ``README.md``: Markdown with YAML front matter, names made harmless."""
    actions = [step.action for step in plan.steps]
    summary = plan.summary()
    kinds = " + ".join(dict.fromkeys(adapter.kind for adapter in provenance.adapters))
    kind = kinds + "".join(
        f", {what} {', '.join(values)}"
        for what, values in (("rank", summary.ranks), ("scale", summary.scales))
        if values
    )
    names = [
        strong(_short_name(path, origin)) + (f" × {weight:g}" if weight != 1 else "")
        for path, origin, weight in zip(
            provenance.adapter_paths, _origins(provenance), plan.weights, strict=True
        )
    ]
    rows = "".join(
        f"| adapter | {code(path, in_table=True)}{_commit(origin)} |\n| adapter digest | `{adapter.digest}` |\n"
        for path, origin, adapter in zip(
            provenance.adapter_paths, _origins(provenance), provenance.adapters, strict=True
        )
    )
    # The Hub links the card to the base by this name.
    base = _base_name(provenance)
    n_as_in_base = actions.count("copied") + actions.count("cast")
    return _CARD.format(
        base=strong(base),
        base_scalar=scalar(base),
        title=name(provenance.out_name),
        adapters=f"the adapter {names[0]}" if len(names) == 1 else f"the adapters {', '.join(names)}",
        base_path=code(provenance.base, in_table=True),
        base_commit=_commit(provenance.base_origin),
        rows=rows,
        kind=kind,
        n_merged=len(actions) - n_as_in_base,
        n_other=n_as_in_base,
        version=provenance.versions["lora-merge"],
    )


def _base_name(provenance: Provenance) -> str:
    """Return the base's repo, or the last part of its path; with an owner where an adapter names a repo of the same
    name.

    What an adapter merely mentions is not what it was merged into.
    """
    if provenance.base_origin is not None:
        return provenance.base_origin.source.repo
    cached = cached_repo(provenance.base)
    if cached is not None:
        return cached[0]
    name = _last_part(provenance.base)
    recorded = [adapter.config.get("base_model_name_or_path") for adapter in provenance.adapters]
    repos = [repo for repo in recorded if isinstance(repo, str) and is_repo(repo) and parse_source(repo)]
    return next((repo for repo in repos if _last_part(repo).lower() == name.lower()), name)


def _short_name(path: str, origin: Origin | None) -> str:
    """Return an adapter's repo, or the last part of its path."""
    return origin.source.repo if origin is not None else _last_part(path)


def _origins(provenance: Provenance) -> tuple[Origin | None, ...]:
    return provenance.adapter_origins or (None,) * len(provenance.adapters)


def _history(provenance: Provenance) -> dict[str, object]:
    """Return the manifest's entry for a base that is itself a merge; empty for any other base."""
    return {"adapters": list(map(asdict, provenance.merged_before))} if provenance.merged_before else {}


def _origin_table(origin: Origin | None) -> dict[str, object]:
    return {} if origin is None else origin.to_json()


def _commit(origin: Origin | None) -> str:
    return f", commit {code(origin.commit, in_table=True)}" if origin is not None and origin.commit else ""


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path

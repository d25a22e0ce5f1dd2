"""Records where an output came from: what a merge was made from, and the text of the manifest.

It names no time, a machine or a process, so the same merge writes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lora_merge.core.adapter import Adapter
from lora_merge.core.checkpoint import MergedBefore
from lora_merge.core.plan import Merge
from lora_merge.formats.front_matter import NO_CARD, CardFacts
from lora_merge.storage.source import Origin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.plan import MergePlan, Step
    from lora_merge.core.tensor import Survival, TensorRecord

MANIFEST_VERSION = 1


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

    base_versions: Mapping[str, str] = field(default_factory=dict)
    """Weight file of a base in a store → its version there (an ETag, a generation)."""

    merged_before: tuple[MergedBefore, ...] = ()
    """Adapters that the base has merged already, by its own manifest."""

    base_card: CardFacts = NO_CARD
    """What the base's model card says."""

    adapter_cards: tuple[CardFacts, ...] = ()
    architecture: str = ""
    """Class of the model, by its configuration; empty where that names none."""

    @property
    def origins(self) -> tuple[Origin | None, ...]:
        """The origin of each adapter."""
        return self.adapter_origins or (None,) * len(self.adapters)


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
                tensors[slot.name]["delta"] = delta_table(step, survival)
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        "versions": dict(provenance.versions),
        "base": {
            "path": provenance.base,
            **_origin_table(provenance.base_origin),
            **({"versions": dict(provenance.base_versions)} if provenance.base_versions else {}),
            **_history(provenance),
        },
        "adapters": [
            {
                "path": path,
                **_origin_table(origin),
                "weight": weight,
                "format": adapter.format,
                "digest": adapter.digest,
                # As its reader hands it on: PEFT's fields, for every format.
                "config": dict(adapter.config),
            }
            for adapter, path, origin, weight in zip(
                provenance.adapters,
                provenance.adapter_paths,
                provenance.origins,
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


def delta_table(step: Step, survival: Survival) -> dict[str, float]:
    """Return what the manifest says of a delta, and of how much of it the storage kept."""
    return {
        "relative_norm": round(survival.relative, 9),
        "unchanged_share": round(survival.unchanged, 6),
        "lost_share": round(survival.lost, 6),
        **_kept(step, survival),
    }


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


def _history(provenance: Provenance) -> dict[str, object]:
    """Return the manifest's entry for a base that is itself a merge; empty for any other base."""
    return {"adapters": list(map(asdict, provenance.merged_before))} if provenance.merged_before else {}


def _origin_table(origin: Origin | None) -> dict[str, object]:
    return {} if origin is None else origin.to_json()

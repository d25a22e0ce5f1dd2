"""Where an output came from: the manifest for programs, the model card for people. Pure text.

Neither names a time, a machine or a process, so the same merge writes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.core.adapter import Adapter
from lora_merge.core.plan import Copy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.plan import MergePlan
    from lora_merge.core.tensor import TensorRecord

MANIFEST_VERSION = 1

_CARD = """\
---
base_model: {base}
base_model_relation: finetune
library_name: transformers
tags:
- lora-merge
- merged
---

# {title}

The weights of **{base}** with the adapter **{adapter}** merged into them. A plain Hugging Face checkpoint: it
needs no LoRA support to load.

| | |
| --- | --- |
| base | `{base_path}` |
| adapter | `{adapter_path}` |
| adapter digest | `{digest}` |
| kind | {kind} |
| tensors | {n_merged} merged, {n_other} as in the base |
| made by | lora-merge {version} |

`merge_manifest.json` beside this file lists every tensor with its digest.
"""


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a merge was made from and made with."""

    base: str
    """The base as the user named it."""

    adapter: Adapter
    adapter_path: str
    """The adapter as the user named it."""

    out_name: str
    options: Mapping[str, object]
    versions: Mapping[str, str]
    """Of lora-merge, Python, torch and numpy."""


def manifest_text(provenance: Provenance, plan: MergePlan, records: Sequence[TensorRecord]) -> str:
    """Return the text of ``merge_manifest.json``."""
    by_name = {record.name: record for record in records}
    tensors: dict[str, dict[str, Any]] = {}
    for step in plan.steps:
        for slot in step.slots:
            tensors[slot.name] = {
                "action": "copied" if isinstance(step.op, Copy) else "merged" if step.op.deltas else "cast",
                "file": slot.file,
                "dtype": slot.dtype,
                "shape": list(slot.shape),
                "digest": by_name[slot.name].digest,
            }
    adapter = provenance.adapter
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        "versions": dict(provenance.versions),
        "base": {"path": provenance.base},
        "adapters": [
            {
                "path": provenance.adapter_path,
                "format": adapter.format,
                "digest": adapter.digest,
                "config": dict(adapter.config),
            }
        ],
        "options": dict(provenance.options),
        "side_files": {file.name: file.origin for file in plan.side_files},
        "tensors": tensors,
    }
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"


def card_text(provenance: Provenance, plan: MergePlan) -> str:
    """Return the text of the model card, ``README.md``."""
    adapter = provenance.adapter
    n_merged = sum(not isinstance(step.op, Copy) and bool(step.op.deltas) for step in plan.steps)
    summary = plan.summary(n_workers=1, disk_free_bytes=0)
    ranks = ", ".join(summary.ranks)
    scales = ", ".join(summary.scales)
    return _CARD.format(
        base=_model_name(adapter.config.get("base_model_name_or_path"), provenance.base),
        title=provenance.out_name,
        adapter=_last_part(provenance.adapter_path),
        base_path=provenance.base,
        adapter_path=provenance.adapter_path,
        digest=adapter.digest,
        kind=f"{adapter.config.get('peft_type')}, rank {ranks}, scale {scales}",
        n_merged=n_merged,
        n_other=len(plan.steps) - n_merged,
        version=provenance.versions["lora-merge"],
    )


def _model_name(recorded: object, path: str) -> str:
    """Return a Hub id when the adapter recorded one, else the last part of the base's path."""
    is_id = (
        isinstance(recorded, str) and recorded.count("/") == 1 and not recorded.startswith((".", "/", "~"))
    )
    return str(recorded) if is_id else _last_part(path)


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path

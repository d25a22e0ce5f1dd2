"""What a merge was made from and with, for its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge._version import __version__
from lora_merge.formats.provenance import Provenance
from lora_merge.formats.stored_versions import versions_of
from lora_merge.native.library import library
from lora_merge.requests.recording import record_of
from lora_merge.storage.hub.uploads.push import is_on_hub
from lora_merge.words import listing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.planning.run import Planned


def provenance_of(planned: Planned, versions: Mapping[str, str] | None = None) -> Provenance:
    """Return the inputs, options and versions of a merge, for the manifest and the model card.

    Args:
        planned: the merge.
        versions: what it was made with, if that was earlier; default: what is here.
    """
    request = planned.request
    return Provenance(
        base=planned.base.text if request.base or planned.base.origin else planned.plan.base,
        adapters=tuple(use.adapter for use in planned.uses),
        adapter_paths=tuple(place.text for place in planned.adapters),
        base_origin=planned.base.origin,
        adapter_origins=tuple(place.origin for place in planned.adapters),
        base_versions=versions_of(planned.checkpoint, planned.inputs),
        merged_before=planned.merged_before,
        out_name=Path(request.out).name.partition("@")[0]
        if is_on_hub(request.out)
        else Path(request.out).name,
        # In the order that manifests always had, so that the same request writes the same bytes.
        options=record_of(request),
        base_card=planned.cards[0],
        adapter_cards=planned.cards[1:],
        architecture=_architecture(planned.checkpoint.config),
        versions=versions or _versions(),
    )


def told_of(planned: Planned) -> dict[str, str]:
    """Return what tells a merge from another one, for people: its inputs, options and versions."""
    from importlib import metadata

    request = planned.request
    return {
        "base": planned.base.text,
        "adapters": listing(request.adapter),
        **{
            f"--{name.replace('_', '-')}": str(value)
            for name, value in record_of(request).items()
            if value not in (None, False)
        },
        "lora-merge": __version__,
        "torch": metadata.version("torch"),
    }


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else ""
    return first if isinstance(first, str) else ""


def _versions() -> dict[str, str]:
    import platform
    from importlib import metadata

    import numpy as np

    return {
        "lora-merge": __version__,
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "numpy": np.__version__,
        "loops": "compiled" if library() else "torch",
    }

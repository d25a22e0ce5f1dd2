"""Is an output there already, and what it would be? Its own manifest and the times of its inputs say so, as for make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.errors import CheckpointError
from lora_merge.io.files import read_json
from lora_merge.io.needed import CONVERSION_MANIFEST
from lora_merge.io.side_files import MANIFEST_FILE
from lora_merge.pipeline.provenance import options_of
from lora_merge.pipeline.resuming import Inputs

if TYPE_CHECKING:
    from pathlib import Path

    from lora_merge.core.source import Origin
    from lora_merge.pipeline.converting import Conversion
    from lora_merge.pipeline.planning import Planned


def is_current(planned: Planned, out: Path) -> bool:
    """Return True when an output was merged from the same base and adapters, by the same options, and none is newer."""
    manifest = _read(out / MANIFEST_FILE)
    base, adapters = manifest.get("base"), manifest.get("adapters")
    if not isinstance(base, dict) or not isinstance(adapters, list):
        return False
    wanted = [
        (use.adapter.digest, dict(use.adapter.config), use.weight, _commit(place.origin))
        for use, place in zip(planned.uses, planned.adapters, strict=True)
    ]
    found = [
        (entry.get("digest"), entry.get("config"), entry.get("weight"), entry.get("commit"))
        for entry in adapters
        if isinstance(entry, dict)
    ]
    named = {planned.base.text, planned.plan.base}
    return (
        found == wanted
        and base.get("path") in named
        and base.get("commit") == _commit(planned.base.origin)
        and manifest.get("options") == options_of(planned.request)
        and _is_newest(out / MANIFEST_FILE, [seen for _, seen in Inputs.of(planned.plan).seen.values()])
    )


def is_current_adapter(conversion: Conversion) -> bool:
    """Return True when an output was converted from the same adapter, by the same options, and nothing is newer."""
    manifest = _read(conversion.out / CONVERSION_MANIFEST)
    own = conversion.provenance
    times = [
        path.stat().st_mtime_ns for root in conversion.inputs for path in root.rglob("*") if path.is_file()
    ]
    return all(manifest.get(key) == own[key] for key in own) and _is_newest(
        conversion.out / CONVERSION_MANIFEST, times
    )


def _read(path: Path) -> dict[str, Any]:
    """Return a manifest, or nothing where there is none, or none that can be read."""
    try:
        return read_json(path) if path.is_file() else {}
    except CheckpointError:
        return {}


def _is_newest(path: Path, times: list[int]) -> bool:
    """Return True when a file is no older than any of its inputs."""
    return all(path.stat().st_mtime_ns >= time for time in times)


def _commit(origin: Origin | None) -> str | None:
    return origin.commit if origin is not None else None

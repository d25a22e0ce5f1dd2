"""Is an output there already, and what it would be? Its own manifest and the times of its inputs say so, as for make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.errors import CheckpointError
from lora_merge.io.files import read_json
from lora_merge.io.needed import CONVERSION_MANIFEST
from lora_merge.io.side_files import MANIFEST_FILE
from lora_merge.pipeline.provenance import options_of

if TYPE_CHECKING:
    from lora_merge.core.source import Origin
    from lora_merge.pipeline.converting import Conversion
    from lora_merge.pipeline.planning import Planned


def is_current(planned: Planned, out: Path) -> bool:
    """Return True when an output was merged from the same base and adapters, by the same options, and none is newer.

    Its weight files are there, too, and have their sizes.
    """
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
        and all(_size(out / file.name) == file.nbytes for file in planned.plan.files)
        and _is_newest(
            out / MANIFEST_FILE, [file.identity.modified for file in planned.inputs.files.values()]
        )
    )


def is_current_adapter(conversion: Conversion) -> bool:
    """Return True when an output was converted from the same adapter, by the same options, and nothing is newer."""
    manifest = _read(conversion.out / CONVERSION_MANIFEST)
    own = json.loads(json.dumps(conversion.provenance))  # lists, as the manifest has them
    files = {
        path for root in conversion.inputs for path in root.iterdir()
    }  # outputs may lie in folders of theirs
    files |= {Path(file.source) for file in conversion.adapter.side_files}
    if conversion.base is not None:
        files |= {Path(ref.file) for ref in conversion.base.tensors()}
    times = [path.stat().st_mtime_ns for path in files if path.is_file()]
    return all(manifest.get(key) == own[key] for key in own) and _is_newest(
        conversion.out / CONVERSION_MANIFEST, times
    )


def _read(path: Path) -> dict[str, Any]:
    """Return a manifest, or nothing where there is none, or none that can be read."""
    try:
        return read_json(path) if path.is_file() else {}
    except CheckpointError:
        return {}


def _size(path: Path) -> int:
    """Return the size of a file in bytes; -1 where there is none."""
    return path.stat().st_size if path.is_file() else -1


def _is_newest(path: Path, times: list[int]) -> bool:
    """Return True when a file is no older than any of its inputs."""
    return all(path.stat().st_mtime_ns >= time for time in times)


def _commit(origin: Origin | None) -> str | None:
    return origin.commit if origin is not None else None

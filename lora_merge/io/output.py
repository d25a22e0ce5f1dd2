"""A written checkpoint as it is found, sound or not: nothing in it makes reading fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import CONFIG_FILE, INDEX_FILE, Output
from lora_merge.errors import CheckpointError
from lora_merge.io.files import read_json
from lora_merge.io.safetensors import read_header

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lora_merge.core.checkpoint import WeightFile

_WEIGHTS = ".safetensors"


def read_output(root: Path) -> Output:
    """Return what is in a directory, from its headers and small files; what cannot be read is said, not raised."""
    broken: dict[str, str] = {}
    names = frozenset(_names(root))

    def attempt(name: str, read: Callable[[Path], Any]) -> Any:
        if name not in names:
            return None
        try:
            return read(root / name)
        except CheckpointError as exc:
            broken[name] = str(exc)
            return None

    config, index = attempt(CONFIG_FILE, read_json), attempt(INDEX_FILE, read_json)
    weights = {name for name in names if name.endswith(_WEIGHTS) and "/" not in name}
    weights |= {str(file) for file in weight_map(index).values()} & names
    found = {name: attempt(name, read_header) for name in sorted(weights)}
    files: dict[str, WeightFile] = {name: file for name, file in found.items() if file is not None}
    return Output(str(root), names, config, index, files, broken)


def weight_map(index: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the table of tensor → file in an index; empty when it has none."""
    found = (index or {}).get("weight_map")
    return found if isinstance(found, dict) else {}


def _names(root: Path) -> list[str]:
    """Return every file below a directory, relative to it."""
    return [
        Path(directory, name).relative_to(root).as_posix()
        for directory, _, names in os.walk(root)
        for name in names
    ]

"""Ways to break a checkpoint or an adapter on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON table; a value of ``...`` removes the key."""
    table = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            table.pop(key, None)
        else:
            table[key] = value
    path.write_text(json.dumps(table))


def edit_tensors(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Load a safetensors file, let a function change the table of tensors, and write it back."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})

"""Ways to break a checkpoint or an adapter on purpose."""

from __future__ import annotations

import json
import re
import zipfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


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


def to_pickles(root: Path) -> None:
    """Store a checkpoint's or an adapter's safetensors as ``.bin`` files instead, with an index if it had one."""
    import torch
    from safetensors.torch import load_file

    for path in root.glob("*.safetensors"):
        torch.save(load_file(path), root / pickled_name(path.name))
        path.unlink()
    index = root / "model.safetensors.index.json"
    if index.is_file():
        table = json.loads(index.read_text())
        table["weight_map"] = {name: pickled_name(file) for name, file in table["weight_map"].items()}
        (root / "pytorch_model.bin.index.json").write_text(json.dumps(table))
        index.unlink()


def pickled_name(name: str) -> str:
    """Return what a weight file in safetensors is called as a ``.bin`` file."""
    return re.sub(r"^model", "pytorch_model", name).replace(".safetensors", ".bin")


def edit_pickle(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Load a ``.bin`` file, let a function change the table of tensors, and write it back."""
    import torch

    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


def edit_records(path: Path, change: Callable[[dict[str, bytes]], None], compression: int = 0) -> None:
    """Let a function change the records of a ``.bin`` file, by their names inside its folder."""
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename.partition("/")[2]: archive.read(entry) for entry in archive.infolist()}
    change(records)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)

"""What is fuzzed: functions of some bytes that may end in an answer or a `LoraMergeError`, and in nothing else.

Those here take bytes as they would lie in a file; those in `structures` make values of every type of them, so that what is
drawn at random nearly parses.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge import adapters
from lora_merge.errors import LoraMergeError
from lora_merge.formats.manifest import merged_before, parse_manifest
from lora_merge.formats.pickles import read_pickle
from lora_merge.formats.safetensors import read_header
from lora_merge.planning.resolve import resolve_base
from lora_merge.storage.small_files import parse_json
from tests.fuzz.structures import STRUCTURES, place

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lora_merge.core.adapter import Adapter

CORPUS = Path(__file__).with_name("corpus")

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def _safetensors(table: Mapping[str, Any], n_bytes: int) -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + bytes(n_bytes)


def _tensors(names: list[str]) -> bytes:
    """Return a safetensors file of F32 matrices ``[2, 3]``."""
    table = {
        name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [24 * n, 24 * n + 24]}
        for n, name in enumerate(dict.fromkeys(names))
    }
    return _safetensors(table, 24 * len(table))


def header(data: bytes) -> None:
    """Read a safetensors file."""
    path = place("header") / "model.safetensors"
    path.write_bytes(data)
    file = read_header(path)
    assert sum(ref.nbytes for ref in file.tensors) <= len(data)
    assert all(ref.end <= len(data) for ref in file.tensors)


def header_text(data: bytes) -> None:
    """Read a safetensors file whose header is as long as it says."""
    text, _, rest = data.partition(b"\0")
    header(struct.pack("<Q", len(text)) + text + rest)


def index(data: bytes) -> None:
    """Resolve a base with an index."""
    root = place("index")
    if not (root / "config.json").exists():
        (root / "config.json").write_text('{"model_type": "llama"}')
        (root / "a.safetensors").write_bytes(_tensors(["x", "y"]))
        (root / "b.safetensors").write_bytes(_tensors(["z"]))
    (root / "model.safetensors.index.json").write_bytes(data)
    base = resolve_base(root)
    names = [ref.name for ref in base.tensors()]
    assert len(names) == len(set(names))
    assert set(names) <= {"x", "y", "z"}


def model_config(data: bytes) -> None:
    """Resolve a base with a ``config.json``."""
    root = place("config")
    if not (root / "model.safetensors").exists():
        (root / "model.safetensors").write_bytes(_tensors(["x"]))
    (root / "config.json").write_bytes(data)
    resolve_base(root)


def adapter_config(data: bytes) -> Adapter:
    """Read an adapter with an ``adapter_config.json``."""
    root = place("adapter")
    if not (root / "adapter_model.safetensors").exists():
        names = [f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"]
        (root / "adapter_model.safetensors").write_bytes(_tensors(names))
    (root / "adapter_config.json").write_bytes(data)
    return adapters.read(root)


def keys(data: bytes) -> None:
    """Read an adapter whose tensors have these names, one a line."""
    root = place("keys")
    if not (root / "adapter_config.json").exists():
        (root / "adapter_config.json").write_text(json.dumps(CONFIG))
    (root / "adapter_model.safetensors").write_bytes(_tensors(data.decode("utf-8", "replace").split("\n")))
    adapters.read(root)


def pickled(data: bytes) -> None:
    """Read a ``.bin`` file."""
    path = place("pickle") / "pytorch_model.bin"
    path.write_bytes(data)
    read_pickle(path)


def manifest(data: bytes) -> None:
    """Read a manifest."""
    table = parse_json(data)
    if isinstance(table, dict):
        merged_before(table)
        parse_manifest(table)


TARGETS: Mapping[str, Callable[[bytes], object]] = {
    function.__name__: function
    for function in (
        header,
        header_text,
        index,
        model_config,
        adapter_config,
        keys,
        pickled,
        manifest,
        *STRUCTURES,
    )
}

EXPECTED: tuple[type[Exception], ...] = (LoraMergeError,)
BY_THEMSELVES: Mapping[str, tuple[type[Exception], ...]] = {
    "manifest": (ValueError, RecursionError)
}  # fmt: skip
"""What the functions that parse text say to text that does not parse; whoever calls them makes a sentence of it."""


def check(name: str, data: bytes) -> None:
    """Run a target on some bytes; anything but an answer or an error with a sentence is raised."""
    try:
        TARGETS[name](data)
    except (*EXPECTED, *BY_THEMSELVES.get(name, ())) as exc:
        if not str(exc):
            raise AssertionError(name) from exc

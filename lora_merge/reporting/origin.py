"""Where an output came from, as its own files tell: manifest and configuration of the output, configuration of the base."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from lora_merge.core.checkpoint import CONFIG_FILE
from lora_merge.errors import LoraMergeError
from lora_merge.formats.manifest import Manifest, RecordedInput, parse_manifest
from lora_merge.formats.side_files import MANIFEST_FILE
from lora_merge.merging.headline import architecture, parameters_text
from lora_merge.reporting.names import dtype, methods_text
from lora_merge.storage.objects.urls import is_store_url
from lora_merge.storage.small_files import read_json
from lora_merge.storage.source import is_hub_text
from lora_merge.storage.user_paths import file_in, user_path
from lora_merge.words import cut, size_text

_DENSE = frozenset({"F64", "F32", "F16", "BF16"})
_MOST_FILES = 50
"""Most files of an adapter that a page lists."""


@dataclass(frozen=True)
class Origin:
    """What the files around a merge say of it. Files that cannot be read say nothing: a page must not fail."""

    output: Mapping[str, Any] = field(default_factory=dict)
    """The output's ``config.json``."""

    base: Mapping[str, Any] = field(default_factory=dict)
    """The base's ``config.json``."""

    manifest: Manifest | None = None
    table: Mapping[str, Any] = field(default_factory=dict)
    """The manifest as JSON, with what `Manifest` leaves out."""

    @property
    def model(self) -> str:
        """Family and size of the model: ``"Llama 8B"``."""
        size = parameters_text(self.n_parameters) if self.n_parameters else ""
        return f"{architecture(self.base or self.output)} {size}".strip()

    @property
    def n_parameters(self) -> int:
        """Parameters of the output; 0 where it is not known, or stored in codes."""
        tensors = self.manifest.tensors.values() if self.manifest else ()
        if any(one.dtype not in _DENSE for one in tensors):
            return 0
        return sum(prod(one.shape) for one in tensors)

    @property
    def base_storage(self) -> str:
        """How the base stores its weights: ``"bf16"``, ``"awq"``; empty where it is not known."""
        return _scheme(self.base) or _dtype(self.base)

    @property
    def output_storage(self) -> str:
        """How the output stores its weights: ``"dense bf16"``, ``"fp8"``; empty where it is not known."""
        if scheme := _scheme(self.output):
            return scheme
        if self.manifest is None:
            return ""
        sizes: Counter[str] = Counter()
        for one in self.manifest.tensors.values():
            sizes[one.dtype] += prod(one.shape)
        return f"dense {dtype(sizes.most_common(1)[0][0])}" if sizes else ""

    @property
    def adapters(self) -> tuple[RecordedInput, ...]:
        """The merged adapters, as the manifest recorded them."""
        return self.manifest.adapters if self.manifest else ()

    @property
    def change(self) -> str:
        """Methods and ranks of the merged adapters, by their configurations: ``"LoRA r16"``."""
        entries = self.table.get("adapters", []) if self.manifest else []
        configs = [entry.get("config") or {} for entry in entries]
        kinds = ["DORA" if one.get("use_dora") else str(one.get("peft_type", "")) for one in configs]
        ranks = [str(one["r"]) for one in configs if isinstance(one.get("r"), int)]
        change = methods_text(filter(None, kinds), ranks)
        return f"{len(configs)} adapters ({change})" if len(configs) > 1 else change

    def headline(self, change: str) -> str:
        """Return what was merged into what, in one line.

        Args:
            change: the methods of the adapters: ``"LoRA r16"``.
        """
        before = ", ".join(filter(None, (self.model, self.base_storage)))
        after = f" → {self.output_storage}" if self.output_storage else ""
        return f"{before} + {change or 'adapter'}{after}"


def near(path: str) -> str:
    """Return a path as seen from the current directory, where it is below it; any other text as it is."""
    try:
        return str(Path(path).relative_to(Path.cwd())) if path.startswith("/") else path
    except (OSError, ValueError):
        return path


def origin_of(out: str, base: str) -> Origin:
    """Return what the files of an output and its base say.

    Args:
        out: directory of the output; empty for none.
        base: directory of the base; empty for the one that the manifest names, if it is still there.
    """
    table = _read(out, MANIFEST_FILE)
    manifest = _manifest(table)
    named = manifest.base.path if manifest and not manifest.base.hub else ""
    # A stranger may have written the manifest, so no store that it names is asked.
    known = base or ("" if is_store_url(named) else named)
    # Only a base that this run has read itself is asked for at a hub: `_read` does not.
    config = _json(f"{base}/{CONFIG_FILE}") if is_hub_text(base) else _read(known, CONFIG_FILE)
    return Origin(_read(out, CONFIG_FILE), config, manifest, table)


def adapter_files(path: str) -> list[str]:
    """Return the files of an adapter's local directory with their sizes; none for a repo."""
    try:
        root = user_path(path)
        found = sorted((one.name, one.stat().st_size) for one in os.scandir(root) if one.is_file())
    except (LoraMergeError, OSError):
        return []
    listed = [f"{name} ({size_text(size)})" for name, size in found[:_MOST_FILES]]
    return [*listed, *filter(None, [cut(_MOST_FILES, len(found))])]


def _manifest(table: Mapping[str, Any]) -> Manifest | None:
    try:
        return parse_manifest(table) if table else None
    except ValueError:
        return None


def _read(folder: str, name: str) -> Mapping[str, Any]:
    """Return a JSON file of a directory; empty where it is not there, or is not such a file."""
    try:
        return _json(file_in(folder, name)) if folder else {}
    except LoraMergeError:
        return {}


def _json(file: str) -> Mapping[str, Any]:
    """Return a JSON file; empty where it is not there, or is not such a file."""
    try:
        return read_json(file)
    except (LoraMergeError, OSError, ValueError, RecursionError):
        return {}


def _scheme(config: Mapping[str, Any]) -> str:
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        return ""
    return str(settings.get("quant_method") or settings.get("quant_algo") or "quantised")


def _dtype(config: Mapping[str, Any]) -> str:
    inner = config.get("text_config")
    for one in (config, inner if isinstance(inner, dict) else {}):
        if name := one.get("dtype") or one.get("torch_dtype"):
            return dtype(str(name))
    return ""

"""What ``merge_manifest.json`` says of an output, read back: the promise that it can be held to years later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from lora_merge.core.checkpoint import MergedBefore
from lora_merge.core.plan import Action
from lora_merge.formats.provenance import MANIFEST_VERSION
from lora_merge.storage.source import HOST_NAMES, Source
from lora_merge.words import quoted

if TYPE_CHECKING:
    from pydantic import TypeAdapter


@dataclass(frozen=True, slots=True)
class RecordedTensor:
    """One tensor of the output."""

    action: Action
    file: str
    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class RecordedFile:
    """One of the files around the weights."""

    origin: Literal["base", "adapter", "lora-merge"]
    digest: str


@dataclass(frozen=True, slots=True)
class RecordedInput:
    """The base, or an adapter."""

    path: str
    """As the user named it."""

    hub: str = ""
    """Name of the hub that it is from; empty for a local directory."""

    id: str = ""
    folder: str = ""
    revision: str | None = None
    commit: str | None = None
    weight: float = 1.0
    """Of an adapter: how much of it was wanted."""

    digest: str = ""
    """Of an adapter: of the file that holds its tensors."""

    def source(self) -> Source | None:
        """Return the repo at the commit that was merged; None for a local directory."""
        host = next((host for host, name in HOST_NAMES.items() if name == self.hub), None)
        if host is None:
            return None
        return Source(host, self.id, self.folder, self.commit or self.revision)


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of it that verification goes by."""

    manifest_version: int
    versions: Mapping[str, str]
    base: RecordedInput
    adapters: tuple[RecordedInput, ...]
    options: Mapping[str, Any]
    side_files: Mapping[str, RecordedFile]
    tensors: Mapping[str, RecordedTensor] = field(repr=False)


def merged_before(table: Mapping[str, Any]) -> tuple[MergedBefore, ...]:
    """Return the adapters that are merged into the output of a manifest: its own, and those of its base.

    Example:
        >>> merged_before({"base": {}, "adapters": [{"path": "my-lora", "digest": "xxh3_128:00"}]})
        (MergedBefore(path='my-lora', digest='xxh3_128:00'),)
    """
    base = table.get("base")
    earlier = base.get("adapters") if isinstance(base, dict) else None
    return tuple(
        MergedBefore(str(entry.get("path", "")), entry["digest"])
        for entries in (earlier, table.get("adapters"))
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict) and isinstance(entry.get("digest"), str) and entry["digest"]
    )


def parse_manifest(table: Mapping[str, Any]) -> Manifest:
    """Return the manifest of a parsed ``merge_manifest.json``.

    Raises:
        ValueError: it is none, or of another version; the message is the end of a sentence.
    """
    from pydantic import ValidationError

    version = table.get("manifest_version")
    if version != MANIFEST_VERSION:
        raise ValueError(f"manifest_version is {quoted(version)}, expected {MANIFEST_VERSION}")
    try:
        manifest: Manifest = _validator().validate_python(table)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}") from exc
    return manifest


@cache
def _validator() -> TypeAdapter[Manifest]:
    """Return pydantic's validator, which takes longer to make than a manifest takes to check."""
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)

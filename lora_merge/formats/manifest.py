"""Reads ``merge_manifest.json`` back: what an output can be verified against, years later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from lora_merge.core.checkpoint import MergedBefore
from lora_merge.core.plan import Action
from lora_merge.core.tensor import Survival
from lora_merge.formats.provenance import MANIFEST_VERSION
from lora_merge.storage.source import HOST_NAMES, Source
from lora_merge.words import quoted

if TYPE_CHECKING:
    from pydantic import TypeAdapter


@dataclass(frozen=True, slots=True)
class RecordedDelta:
    """What the manifest says of a delta that was not rounded to the nearest number of a plain dtype."""

    effect_norm: float | None = None
    """As `lora_merge.core.tensor.Survival.effect_norm`, and so the next; None where nothing is said."""

    effect_error: float | None = None
    relative_norm: float | None = None
    """‖Δ‖ / ‖W‖."""

    lost_share: float | None = None
    """‖Δ′ - Δ‖ / ‖Δ‖, with Δ′ the difference that is stored."""

    kept_share: float | None = None
    """⟨Δ′, Δ⟩ / ‖Δ‖²; None where values became the nearest number of a plain dtype."""


@dataclass(frozen=True, slots=True)
class RecordedTensor:
    """What the manifest says of one tensor of the output."""

    action: Action
    file: str
    dtype: str
    shape: tuple[int, ...]
    digest: str
    delta: RecordedDelta = RecordedDelta()


@dataclass(frozen=True, slots=True)
class RecordedFile:
    """What the manifest says of one file around the weights."""

    origin: Literal["base", "adapter", "lora-merge"]
    digest: str


@dataclass(frozen=True, slots=True)
class RecordedInput:
    """What the manifest says of the base, or of an adapter."""

    path: str
    """As the user named it."""

    hub: str = ""
    """Name of its hub; empty for a local directory."""

    id: str = ""
    folder: str = ""
    revision: str | None = None
    commit: str | None = None
    weight: float = 1.0
    """An adapter's merge weight."""

    digest: str = ""
    """Digest of an adapter's weight file."""

    versions: Mapping[str, str] = field(default_factory=dict)
    """Weight file of a base in a store → its version when it was read."""

    def source(self) -> Source | None:
        """Return the repo at the commit that was merged; None for a local directory."""
        # The manifest has the hub's name as people write it, not the scheme.
        host = next((host for host, name in HOST_NAMES.items() if name == self.hub), None)
        if host is None:
            return None
        return Source(host, self.id, self.folder, self.commit or self.revision)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The parts of a manifest that verification uses."""

    manifest_version: int
    versions: Mapping[str, str]
    base: RecordedInput
    adapters: tuple[RecordedInput, ...]
    options: Mapping[str, Any]
    side_files: Mapping[str, RecordedFile]
    tensors: Mapping[str, RecordedTensor] = field(repr=False)

    def deltas(self) -> dict[str, dict[str, float]]:
        """Return what was recorded of each tensor's delta, as far as the model card repeats it."""
        return {
            name: {
                key: value
                for key in ("relative_norm", "lost_share", "kept_share")
                if (value := getattr(tensor.delta, key)) is not None
            }
            for name, tensor in self.tensors.items()
            if tensor.delta.relative_norm is not None and tensor.delta.lost_share is not None
        }

    def survival(self, name: str) -> Survival | None:
        """Return what was recorded of a tensor's delta, as far as verification computes it again; None for nothing."""
        delta = self.tensors[name].delta if name in self.tensors else RecordedDelta()
        if delta.effect_norm is None or delta.effect_error is None:
            return None
        return Survival(0.0, 0.0, 0.0, 0.0, effect_norm=delta.effect_norm, effect_error=delta.effect_error)


def merged_before(table: Mapping[str, Any]) -> tuple[MergedBefore, ...]:
    """Return all adapters in an output, by its manifest: its own, and those that its base had before.

    Example:
        >>> merged_before({"base": {}, "adapters": [{"path": "my-lora", "digest": "xxh3_128:00"}]})
        (MergedBefore(path='my-lora', digest='xxh3_128:00'),)
    """
    base = table.get("base")
    earlier = base.get("adapters") if isinstance(base, dict) else None
    return tuple(
        MergedBefore(str(entry.get("path", "")), entry["digest"])
        # The table is not validated here: malformed entries are passed over.
        for entries in (earlier, table.get("adapters"))
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict) and isinstance(entry.get("digest"), str) and entry["digest"]
    )


def parse_manifest(table: Mapping[str, Any]) -> Manifest:
    """Return the manifest of a parsed ``merge_manifest.json``, with its types checked.

    Raises:
        ValueError: it is not a manifest, or of another version; the message is the end of a sentence.
    """
    from pydantic import ValidationError

    # Before pydantic looks: a manifest of another version would fail with errors about fields.
    version = table.get("manifest_version")
    if version != MANIFEST_VERSION:
        raise ValueError(f"manifest_version is {quoted(version)}, expected {MANIFEST_VERSION}")
    try:
        manifest: Manifest = _validator().validate_python(table)
    except ValidationError as exc:
        # One sentence for the user: the first of pydantic's errors.
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}") from exc
    return manifest


@cache
def _validator() -> TypeAdapter[Manifest]:
    """Return pydantic's validator. Making it takes longer than checking a manifest, so it is kept."""
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)

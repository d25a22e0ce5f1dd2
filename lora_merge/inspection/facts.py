"""What is known of an adapter once its headers are read: module by module, and engine by engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_merge.core.report import Issue
from lora_merge.serving.engine_report import EngineReport


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """One module that an adapter changes, or one parameter of ``target_parameters``."""

    path: str
    """As the adapter names it."""

    kind: str
    """The algebra or the method: ``"low_rank"``, ``"dora"``, ``"LOHA"``, ``"whole"`` for a parameter that is replaced."""

    rank: int
    """r; 0 where the method has none."""

    scale: float | None
    """What B A is multiplied by; None where the method has no such factor."""

    shape: tuple[int, ...]
    """Of the change, ``[out, in]``; empty where only the base knows it."""

    nbytes: int
    """Of its tensors."""

    delta_norm: float | None = None
    """‖Δ‖, with a base at hand."""

    weight_norm: float | None = None
    """‖W‖, with a base at hand."""

    @property
    def relative(self) -> float | None:
        """Return ‖Δ‖ / ‖W‖; None without a base."""
        if self.delta_norm is None or not self.weight_norm:
            return None
        return self.delta_norm / self.weight_norm


@dataclass(frozen=True, slots=True)
class Inspection:
    """An adapter, described."""

    adapter: str
    """As the user named it."""

    format: str
    """Names a reader in `lora_merge.adapters`."""

    kind: str
    """The PEFT type."""

    framework: str
    """What trained it, as far as its files tell: ``"ms-swift"``, ``"Unsloth"``; empty when they do not."""

    base: str
    """What it was inspected against; else what it names as its base; empty if neither."""

    with_base: bool
    """True when it was held against a base."""

    digest: str
    nbytes: int
    """Of its tensors."""

    targets: str
    """``target_modules`` as they are written."""

    modules: tuple[ModuleFacts, ...]

    settings: Mapping[str, str] = field(default_factory=dict)
    """Fields of the configuration that change what it computes, in words."""

    files: tuple[str, ...] = ()
    """What else the directory holds."""

    provenance: Mapping[str, str] = field(default_factory=dict)
    """Who made it, from what: PEFT's version, revisions, arguments of the training."""

    rank_counts: Mapping[int, int] = field(default_factory=dict)
    """How many modules have each rank."""

    engines: tuple[EngineReport, ...] = ()
    issues: tuple[Issue, ...] = ()
    """What a merge would say of it; errors included."""

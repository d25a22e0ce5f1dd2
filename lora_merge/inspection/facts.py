"""The description of an adapter, as values: facts about each module, and a report for each engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_merge.core.report import Issue
from lora_merge.serving.engine_report import EngineReport


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """One module that an adapter changes, or one parameter of ``target_parameters``."""

    path: str
    """Path in the adapter's names."""

    kind: str
    """The algebra or PEFT's method: ``"low_rank"``, ``"dora"``, ``"LOHA"``; ``"whole"`` for a replaced parameter."""

    rank: int
    """The rank r; 0 if the method has none."""

    scale: float | None
    """Multiplier of B A; None if the method has none."""

    shape: tuple[int, ...]
    """Shape of the change, ``[out, in]``; empty if only the base could tell."""

    nbytes: int
    """Size of its tensors in bytes."""

    delta_norm: float | None = None
    """‖Δ‖, Frobenius norm; None without a base."""

    weight_norm: float | None = None
    """‖W‖, Frobenius norm; None without a base."""

    storage: str = ""
    """How the base stores its weight, in words: ``"BF16"``, ``"FP8, blocks of 128 x 128"``; empty without a base."""

    @property
    def relative(self) -> float | None:
        """‖Δ‖ / ‖W‖; None without a base, or if ‖W‖ is 0."""
        if self.delta_norm is None or not self.weight_norm:
            return None
        return self.delta_norm / self.weight_norm


@dataclass(frozen=True, slots=True)
class Inspection:
    """The description of an adapter."""

    adapter: str
    """The adapter as the user named it."""

    format: str
    """Name of its reader in `lora_merge.adapters`: ``"peft"``, ``"mlx"`` …"""

    kind: str
    """The PEFT type."""

    framework: str
    """The trainer, as far as its files tell: ``"ms-swift"``, ``"Unsloth"``; otherwise empty."""

    base: str
    """The base that was given, otherwise the one that the adapter names, otherwise empty."""

    with_base: bool
    """True if it was compared with a base."""

    digest: str
    nbytes: int
    """Size of its tensors in bytes."""

    targets: str
    """``target_modules``, in words."""

    modules: tuple[ModuleFacts, ...]

    storages: Mapping[str, int] = field(default_factory=dict)
    """How the base stores its weights, in words → number of weights; empty without a base."""

    settings: Mapping[str, str] = field(default_factory=dict)
    """Fields of the configuration that affect its computation → value as text."""

    files: tuple[str, ...] = ()
    """Files in its directory."""

    provenance: Mapping[str, str] = field(default_factory=dict)
    """Label → text: PEFT's version, revisions, settings of the training, earlier conversions."""

    rank_counts: Mapping[int, int] = field(default_factory=dict)
    """Rank → number of modules with it."""

    engines: tuple[EngineReport, ...] = ()
    issues: tuple[Issue, ...] = ()
    """Issues that a merge would report, errors included."""

"""What is known of an adapter once its headers are read: module by module, and engine by engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_merge.core.report import Issue

IF_SERVED = ", if it serves the family"
"""How a verdict ends while the base's family is not known."""

VERDICTS = (
    "yes", f"yes{IF_SERVED}", "with an option", f"with an option{IF_SERVED}", "perhaps", "not known", "no",
)  # fmt: skip
"""What an engine makes of an adapter. ``"perhaps"``: the family of the base, which is not given, decides it;
``"not known"``: it is given, and whether the engine serves LoRA for it is not known."""


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
class Obstacle:
    """One reason why an engine does not serve an adapter as it is."""

    trait: str
    """What about the adapter it is: a key of `lora_merge.core.traits.TRAITS`."""

    effect: str
    """``"refused"``, ``"wrong"``: computed otherwise, without a word; ``"option"``: served with an option of the engine;
    ``"depends"``: refused or not, by the family of the base, which is not given; ``"unknown"``: whether the engine
    serves LoRA for the family is not known."""

    sentence: str

    cures: tuple[str, ...]
    """Commands and options that help, each on its own, the best first."""

    source: str
    """Where it is seen: file, version, and whether it was run or read."""


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What one engine makes of an adapter."""

    engine: str
    version: str
    """The release that its rules were taken from."""

    obstacles: tuple[Obstacle, ...]

    family: str = "unstated"
    """Whether it serves LoRA for the base's family: ``"served"``, ``"refused"``, ``"unknown"``: the engine's table does
    not say; ``"unstated"``: the base is not given, and the adapter does not say its class."""

    @property
    def verdict(self) -> str:
        """Return one of `VERDICTS`."""
        effects = {one.effect for one in self.obstacles}
        if effects & {"refused", "wrong"}:
            return "no"
        if "unknown" in effects:
            return "not known"
        if "depends" in effects:
            return "perhaps"
        found = "with an option" if effects else "yes"
        return f"{found}{IF_SERVED}" if self.family == "unstated" else found


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

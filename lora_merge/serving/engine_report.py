"""The report on one engine: whether it serves an adapter as it is, and every reason against it."""

from __future__ import annotations

from dataclasses import dataclass

IF_SERVED = ", if it serves the family"
"""The end of a verdict if the base's family is not known."""

VERDICTS = (
    "yes",
    f"yes{IF_SERVED}",
    "with an option",
    f"with an option{IF_SERVED}",
    "perhaps",
    "not known",
    "no",
)
"""Whether an engine serves an adapter. ``"perhaps"``: the base's family decides, and no base was given. ``"not known"``:
the family is known, but not whether the engine serves LoRA for it."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One reason why an engine does not serve an adapter as it is."""

    trait: str
    """A key of `lora_merge.serving.traits.TRAITS`, or ``family``, ``modules``, ``format``, ``rank``."""

    effect: str
    """``"refused"``: the engine reports an error or fails. ``"wrong"``: it loads the adapter and computes something else.
    ``"option"``: it needs an option. ``"depends"``: the base's family decides, and no base was given. ``"unknown"``: it is
    not known whether the engine serves LoRA for the family."""

    sentence: str

    cures: tuple[str, ...]
    """Commands and options that help. Each suffices; the best comes first."""

    source: str
    """Evidence: file, version, and whether the code was run or read."""


@dataclass(frozen=True, slots=True)
class EngineReport:
    """Whether one engine serves an adapter, and why not."""

    engine: str
    version: str
    """The release from which its rules were taken."""

    obstacles: tuple[Obstacle, ...]

    family: str = "unstated"
    """Whether the engine serves LoRA for the base's family: ``"served"``, ``"refused"``, ``"unknown"`` (its table does not
    tell) or ``"unstated"`` (no base was given, and the adapter does not name its class)."""

    @property
    def cures(self) -> tuple[str, ...]:
        """What helps, each once: conversions if they cure every obstacle, then the merge, which always helps."""
        # An obstacle whose only cure is the merge makes conversions for the others useless.
        is_curable = all(len(one.cures) > 1 for one in self.obstacles)
        own = [cure for one in self.obstacles for cure in one.cures[:-1] if is_curable]
        last = [cure for one in self.obstacles[:1] for cure in one.cures[-1:]]
        return tuple(dict.fromkeys([*own, *last]))

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        effects = {one.effect for one in self.obstacles}
        # The worst effect decides.
        if effects & {"refused", "wrong"}:
            return "no"
        if "unknown" in effects:
            return "not known"
        if "depends" in effects:
            return "perhaps"
        found = "with an option" if effects else "yes"
        return f"{found}{IF_SERVED}" if self.family == "unstated" else found

"""What a serving engine makes of an adapter as it is: a verdict, and every reason against it."""

from __future__ import annotations

from dataclasses import dataclass

IF_SERVED = ", if it serves the family"
"""How a verdict ends while the base's family is not known."""

VERDICTS = (
    "yes",
    f"yes{IF_SERVED}",
    "with an option",
    f"with an option{IF_SERVED}",
    "perhaps",
    "not known",
    "no",
)
"""What an engine makes of an adapter. ``"perhaps"``: the family of the base, which is not given, decides it;
``"not known"``: it is given, and whether the engine serves LoRA for it is not known."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One reason why an engine does not serve an adapter as it is."""

    trait: str
    """What about the adapter it is: a key of `lora_merge.serving.traits.TRAITS`."""

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

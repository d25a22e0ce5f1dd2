"""What a rule about an engine is: which trait it stumbles over, how, and what helps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lora_merge.serving.family import BaseFamily

Effect = Literal["refused", "wrong", "option"]

Need = Literal[
    "to-lora",
    "bake-scale",
    "pad-rank",
    "expand-targets",
    "every-layer",
    "every-name",
    "packed",
    "split-experts",
    "rename-v4",
    "without-copies",
    "rewrite",
]
"""What a conversion does about a trait; ``rewrite``: writing the adapter anew is enough."""


@dataclass(frozen=True, slots=True)
class Rule:
    """An engine does not serve adapters with a trait as they are."""

    trait: str
    """A key of `lora_merge.serving.traits.TRAITS`."""

    effect: Effect
    """``"wrong"``: computed otherwise, or left out, without a word."""

    sentence: str
    """What the engine does."""

    source: str
    """Where that is seen, and whether it was run or read."""

    needs: tuple[Need, ...] = ()
    """What a conversion has to do; nothing where only a merge helps."""

    only_for: frozenset[str] = frozenset()
    """Families that it holds for, by ``model_type`` or class; empty: all."""

    except_for: frozenset[str] = frozenset()
    """Families that it does not hold for, by ``model_type`` or class."""

    option: str = ""
    """Of an ``"option"``: how the engine is told."""

    by_base: bool = False
    """True where only the base shows whether it holds."""

    @property
    def depends(self) -> bool:
        """Return True when the base decides whether it holds."""
        return self.by_base or bool(self.only_for or self.except_for)

    def applies(self, family: BaseFamily) -> bool:
        """Return True when it holds for a family, or what is known of the family does not tell and it may."""
        names = family.names
        if not names.isdisjoint(self.except_for):
            return False
        return not self.only_for or not names.isdisjoint(self.only_for) or not family.is_sure

    def is_open(self, family: BaseFamily) -> bool:
        """Return True when what is known of the family does not tell whether it holds."""
        if self.by_base:
            return not family.model_type
        is_named = not family.names.isdisjoint(self.only_for | self.except_for)
        return self.depends and not (is_named or family.is_sure)


NO_SUCH_MODULES = Rule(
    "experts-apart",
    "refused",
    "has no modules of these names: only a copy of the model for 4-bit training has them",
    "unsloth_zoo cc050d19 (2026), temporary_patches/gpt_oss.py, read",
)
"""Holds for every engine: each has the experts of the published model."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks that an engine serves."""

    most: int
    """The largest that any option allows; 0: there is no limit."""

    default: int = 0
    """The largest without an option; 0: as `most`."""

    option: str = ""
    """The option that raises it, ``"--max-lora-rank"``."""

    allowed: tuple[int, ...] = ()
    """Values that the option, or the adapter, may have; empty: any."""

    by_padding: bool = False
    """True where the adapter itself has to have one of them; else the option has."""

    effect: Effect = "wrong"
    otherwise: str = ""
    """What the engine does with another rank."""

    source: str = ""


Standing = Literal["served", "refused", "unknown", "unstated"]
"""Whether an engine serves LoRA for a family: yes; no; the table does not say; the family is not known."""


@dataclass(frozen=True, slots=True)
class Families:
    """The families that an engine serves LoRA for, and which modules of each."""

    key: Literal["model_type", "class"]
    """What the engine tells families apart by."""

    served: Mapping[str, str]
    """Family → a pattern of the paths of modules that have LoRA; empty: every linear layer has."""

    source: str
    """Where that is seen."""

    refused: frozenset[str] = frozenset()
    """Families that the release knows, and has no LoRA for."""

    unknown: frozenset[str] = frozenset()
    """Families that the release knows; whether it has LoRA for them is not known."""

    is_complete: bool = False
    """True where the release serves no family that is not listed."""

    lacking: str = "has no LoRA on"
    """What it does with other modules of a family that it serves."""

    effect: Effect = "refused"
    """Of such a module."""

    def names(self, family: BaseFamily) -> tuple[str, ...]:
        """Return the names by which the engine would look for a family."""
        by_type = (family.model_type,) if family.model_type else ()
        return by_type if self.key == "model_type" else family.architectures

    def standing(self, family: BaseFamily) -> Standing:
        """Return whether the engine serves LoRA for a family."""
        names = self.names(family)
        if not names:
            return "unknown" if family.model_type else "unstated"
        if any(name in self.served for name in names):
            return "served"
        if any(name in self.unknown for name in names):
            return "unknown"
        is_refused = self.is_complete or any(name in self.refused for name in names)
        return "refused" if is_refused else "unknown"

    def pattern(self, family: BaseFamily) -> str:
        """Return the pattern of the modules that have LoRA; empty where all linear layers have, or it is not known."""
        return next((self.served[name] for name in self.names(family) if name in self.served), "")


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine, and what it makes of adapters."""

    name: str
    """As people write it."""

    version: str
    """The release that its rules were taken from."""

    ranks: Ranks
    families: Families
    rules: tuple[Rule, ...]

    format: Literal["peft", "gguf"] = "peft"
    """What it reads."""

    always: tuple[Need, ...] = ()
    """What a conversion does in any case, since only the base shows whether it is needed."""

    @property
    def by_trait(self) -> Mapping[str, Rule]:
        """Return the rules by their traits."""
        return {rule.trait: rule for rule in (NO_SUCH_MODULES, *self.rules)}

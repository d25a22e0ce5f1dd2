"""The types of rules about engines: the trait, its effect, and what helps."""

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
"""What a conversion does about a trait. ``rewrite``: nothing but writing the adapter in PEFT's form."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Says that an engine does not serve adapters with a trait as they are."""

    trait: str
    """A key of `lora_merge.serving.traits.TRAITS`."""

    effect: Effect
    """``"wrong"``: the engine computes something else, or leaves the module out, and reports nothing."""

    sentence: str
    """What the engine does; its name comes before it."""

    source: str
    """Evidence: version and place in the code, and whether the code was run or read."""

    needs: tuple[Need, ...] = ()
    """What a conversion has to do; empty if only a merge helps."""

    only_for: frozenset[str] = frozenset()
    """Families to which it applies, by ``model_type`` or class; empty: all."""

    except_for: frozenset[str] = frozenset()
    """Families to which it does not apply, by ``model_type`` or class."""

    option: str = ""
    """The engine's option, if the effect is ``"option"``."""

    by_base: bool = False
    """True if only the base's files show whether it applies."""

    @property
    def depends(self) -> bool:
        """True if the base decides whether it applies."""
        return self.by_base or bool(self.only_for or self.except_for)

    def applies(self, family: BaseFamily) -> bool:
        """Return True if it applies to a family, or may apply because too little is known of the family."""
        names = family.names
        if not names.isdisjoint(self.except_for):
            return False
        # While one of the family's names is unknown, that one may be in the list.
        return not self.only_for or not names.isdisjoint(self.only_for) or not family.is_sure

    def is_open(self, family: BaseFamily) -> bool:
        """Return True if too little is known of the family to tell whether it applies."""
        if self.by_base:
            return not family.model_type
        is_named = not family.names.isdisjoint(self.only_for | self.except_for)
        return self.depends and not (is_named or family.is_sure)


NO_SUCH_MODULES = Rule(
    "experts-apart",
    "refused",
    "has no modules with these names, which exist only in a copy of the model for 4-bit training",
    "unsloth_zoo cc050d19 (2026), temporary_patches/gpt_oss.py, read",
)
"""Applies to every engine, since each has the experts of the published model."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks that an engine serves."""

    most: int
    """Largest rank with any option; 0: no limit."""

    default: int = 0
    """Largest rank without an option; 0: the same as `most`."""

    option: str = ""
    """The option that raises it, ``"--max-lora-rank"``."""

    allowed: tuple[int, ...] = ()
    """Values that the option or, with `by_padding`, the adapter may have; empty: any."""

    by_padding: bool = False
    """True if the adapter's own rank has to be one of them; otherwise the option's value has to."""

    effect: Effect = "wrong"
    otherwise: str = ""
    """What the engine does with a rank that is not among them."""

    source: str = ""


Standing = Literal["served", "refused", "unknown", "unstated"]
"""Whether an engine serves LoRA for a family: yes, no, the table does not tell, or the family is not known."""


@dataclass(frozen=True, slots=True)
class Families:
    """The families that an engine serves LoRA for, and which modules of each."""

    key: Literal["model_type", "class"]
    """The name by which the engine recognises a family."""

    served: Mapping[str, str]
    """Family → a regex of the paths of modules that have LoRA; empty: every linear layer."""

    source: str
    """Evidence, as in a `Rule`."""

    refused: frozenset[str] = frozenset()
    """Families that the release serves without LoRA."""

    unknown: frozenset[str] = frozenset()
    """Families that the release serves; nothing is known about LoRA for them."""

    is_complete: bool = False
    """True if the release serves only families that are listed here."""

    lacking: str = "has no LoRA on"
    """What the engine does with other modules of a family that it serves."""

    effect: Effect = "refused"
    """The effect of such a module."""

    def names(self, family: BaseFamily) -> tuple[str, ...]:
        """Return the names by which the engine would look up a family: its type or its classes."""
        by_type = (family.model_type,) if family.model_type else ()
        return by_type if self.key == "model_type" else family.architectures

    def standing(self, family: BaseFamily) -> Standing:
        """Return whether the engine serves LoRA for a family; see `Standing`."""
        names = self.names(family)
        if not names:
            # Known by the other name only, so the table cannot be asked.
            return "unknown" if family.model_type else "unstated"
        if any(name in self.served for name in names):
            return "served"
        if any(name in self.unknown for name in names):
            return "unknown"
        is_refused = self.is_complete or any(name in self.refused for name in names)
        return "refused" if is_refused else "unknown"

    def pattern(self, family: BaseFamily) -> str:
        """Return the regex of modules that have LoRA; empty if all linear layers have it, or nothing is known."""
        return next((self.served[name] for name in self.names(family) if name in self.served), "")


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine: the release that was looked at, and the rules found in it."""

    name: str
    """The name as people write it."""

    version: str
    """The release from which its rules were taken."""

    ranks: Ranks
    families: Families
    rules: tuple[Rule, ...]

    format: Literal["peft", "gguf"] = "peft"
    """The format of adapters that it reads."""

    always: tuple[Need, ...] = ()
    """What a conversion always does, because only the base shows whether it is needed."""

    @property
    def by_trait(self) -> Mapping[str, Rule]:
        """Trait → rule, with the rule that applies to every engine."""
        return {rule.trait: rule for rule in (NO_SUCH_MODULES, *self.rules)}

"""What a rule about an engine is: which trait it stumbles over, how, and what helps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

Effect = Literal["refused", "wrong", "option"]

Need = Literal[
    "to-lora", "bake-scale", "pad-rank", "expand-targets", "every-layer", "every-name", "packed", "split-experts", "rename-v4", "without-copies",
    "rewrite",
]  # fmt: skip
"""What a conversion does about a trait; ``rewrite``: writing the adapter anew is enough."""


@dataclass(frozen=True, slots=True)
class Rule:
    """An engine does not serve adapters with a trait as they are."""

    trait: str
    """A key of `lora_merge.core.traits.TRAITS`."""

    effect: Effect
    """``"wrong"``: computed otherwise, or left out, without a word."""

    sentence: str
    """What the engine does."""

    source: str
    """Where that is seen, and whether it was run or read."""

    needs: tuple[Need, ...] = ()
    """What a conversion has to do; nothing where only a merge helps."""

    only_for: frozenset[str] = frozenset()
    """Values of ``model_type`` that it holds for; empty: all."""

    except_for: frozenset[str] = frozenset()
    """Values of ``model_type`` that it does not hold for."""

    by_base: bool = False
    """True where only the base shows whether it holds."""

    @property
    def depends(self) -> bool:
        """Return True when the base decides whether it holds."""
        return self.by_base or bool(self.only_for or self.except_for)

    def applies(self, model_type: str) -> bool:
        """Return True when it holds for a model, or the model is not known and it may."""
        if not model_type:
            return True
        return (not self.only_for or model_type in self.only_for) and model_type not in self.except_for


NO_SUCH_MODULES = Rule(
    "experts-apart",
    "refused",
    "has no modules of these names: only a copy of the model for 4-bit training has them",
    "unsloth_zoo 2026.3, temporary_patches/gpt_oss.py, read",
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


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine, and what it makes of adapters."""

    name: str
    """As people write it."""

    version: str
    """The release that its rules were taken from."""

    ranks: Ranks
    rules: tuple[Rule, ...]

    format: Literal["peft", "gguf"] = "peft"
    """What it reads."""

    always: tuple[Need, ...] = ()
    """What a conversion does in any case, since only the base shows whether it is needed."""

    @property
    def by_trait(self) -> Mapping[str, Rule]:
        """Return the rules by their traits."""
        return {rule.trait: rule for rule in (NO_SUCH_MODULES, *self.rules)}

"""The family of a base model, as engines tell families apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class BaseFamily:
    """The known names of a base's family; both fields are empty if nothing is known."""

    model_type: str = ""
    """``model_type`` of ``config.json``: ``"gpt_neox"``."""

    architectures: tuple[str, ...] = ()
    """Classes, including one of custom code: ``("GPTNeoXForCausalLM",)``."""

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> BaseFamily:
        """Return the family that a ``config.json`` names; values of other types are ignored."""
        named = config.get("architectures")
        found = [str(name) for name in named] if isinstance(named, list | tuple) else []
        # A model with its own code names its class here.
        auto_map = config.get("auto_map")
        custom = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
        if isinstance(custom, str):
            found.append(custom.rpartition(".")[2])
        return cls(str(config.get("model_type") or ""), tuple(dict.fromkeys(found)))

    @classmethod
    def of_adapter(cls, config: Mapping[str, Any]) -> BaseFamily:
        """Return the family that an ``adapter_config.json`` shows: the class that PEFT writes into ``auto_mapping``."""
        mapping = config.get("auto_mapping")
        named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        return cls("", (named,) if isinstance(named, str) and named else ())

    @property
    def names(self) -> frozenset[str]:
        """Model type and classes together, for look-ups."""
        return frozenset({self.model_type, *self.architectures} - {""})

    @property
    def is_sure(self) -> bool:
        """True if model type and class are known. Then a name that differs from both is not the family's."""
        return bool(self.model_type and self.architectures)

    def __bool__(self) -> bool:
        """Return True if anything is known."""
        return bool(self.names)

    def __str__(self) -> str:
        """Return the first class, or the model type; empty if nothing is known."""
        return next(iter(self.architectures), self.model_type)

"""The family of a base model, as engines tell families apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class BaseFamily:
    """What is known of a base's family; nothing, where no base is at hand and the adapter does not say it."""

    model_type: str = ""
    """Of ``config.json``: ``"gpt_neox"``."""

    architectures: tuple[str, ...] = ()
    """Classes, the one with custom code included: ``("GPTNeoXForCausalLM",)``."""

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> BaseFamily:
        """Return the family of a ``config.json``."""
        named = config.get("architectures")
        found = [str(name) for name in named] if isinstance(named, list | tuple) else []
        auto_map = config.get("auto_map")
        custom = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
        if isinstance(custom, str):
            found.append(custom.rpartition(".")[2])
        return cls(str(config.get("model_type") or ""), tuple(dict.fromkeys(found)))

    @classmethod
    def of_adapter(cls, config: Mapping[str, Any]) -> BaseFamily:
        """Return what an ``adapter_config.json`` shows: PEFT writes down the class of the base in ``auto_mapping``."""
        mapping = config.get("auto_mapping")
        named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        return cls("", (named,) if isinstance(named, str) and named else ())

    @property
    def names(self) -> frozenset[str]:
        """Return every name that it goes by."""
        return frozenset({self.model_type, *self.architectures} - {""})

    @property
    def is_sure(self) -> bool:
        """Return True when both are known, so that a name that is not among them is not its name."""
        return bool(self.model_type and self.architectures)

    def __bool__(self) -> bool:
        """Return True when something is known."""
        return bool(self.names)

    def __str__(self) -> str:
        """Return the name that a reader knows best."""
        return next(iter(self.architectures), self.model_type)

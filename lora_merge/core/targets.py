"""Which modules an adapter targets, by PEFT's exact rule, from names alone.

PEFT's own functions need torch and a live model; these need neither, and the property tests hold them
against PEFT's on generated module trees.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lora_merge.core.patterns import TargetError, compile_pattern, full_match, match

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ALL_LINEAR = "all-linear"
"""PEFT's shorthand: every linear layer but the output embedding; any case."""

Value = TypeVar("Value")
Names = str | tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class TargetRule:
    """The fields of a PEFT configuration that choose modules."""

    target_modules: Names
    exclude_modules: Names = None
    layers_to_transform: tuple[int, ...] | None = None
    """None when every layer is meant; an empty list means the same to PEFT."""

    layers_pattern: tuple[str, ...] = ()

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> TargetRule:
        """Return the rule of an ``adapter_config.json``.

        Raises:
            TargetError: a field has the wrong type, or a regex does not compile.
        """
        layers = config.get("layers_to_transform")
        if isinstance(layers, int) and not isinstance(layers, bool):
            layers = [layers]
        if layers is not None and not (
            isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)
        ):
            raise TargetError("layers_to_transform", f"is {layers!r}, expected a number or a list of numbers")
        patterns = _names(config, "layers_pattern") or ()
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            compile_pattern("layers_pattern", rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.")
        rule = cls(
            target_modules=_names(config, "target_modules"),
            exclude_modules=_names(config, "exclude_modules"),
            layers_to_transform=tuple(layers) if layers else None,
            layers_pattern=(patterns,) if isinstance(patterns, str) else patterns,
        )
        if isinstance(rule.target_modules, str) and not rule.all_linear:
            compile_pattern("target_modules", rule.target_modules)
        if isinstance(rule.exclude_modules, str):
            compile_pattern("exclude_modules", rule.exclude_modules)
        return rule

    @property
    def all_linear(self) -> bool:
        """Return True for the ``"all-linear"`` shorthand."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def excludes(self, module: str) -> bool:
        """Return True when ``exclude_modules`` takes the module out."""
        excluded = self.exclude_modules
        if not excluded:
            return False
        if isinstance(excluded, str):
            return full_match("exclude_modules", excluded, module) is not None
        return is_listed(module, excluded)

    def matches(self, module: str) -> bool:
        """Return True when PEFT would adapt a module of this path.

        ``"all-linear"`` matches every path here: it is a statement about module classes, which the
        caller must check.

        Reference:
            ``peft.tuners.tuners_utils.check_target_module_exists`` (PEFT 0.21.2).
        """
        if self.excludes(module):
            return False
        targets = self.target_modules
        if targets is None:
            return False
        if isinstance(targets, str):
            return self.all_linear or full_match("target_modules", targets, module) is not None
        if module in targets:  # an exact path is not filtered by layer
            return True
        return is_listed(module, targets) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        """Return True when ``layers_to_transform`` lets the module's layer through."""
        if self.layers_to_transform is None:
            return True
        # The lazy prefix finds the first number, the layer's, not an expert's.
        found = [
            match("layers_pattern", rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", module, pattern)
            for pattern in self.layers_pattern
        ] or [re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", module)]
        first = next((one for one in found if one), None)
        return (
            first is not None and first["idx"] is not None and int(first["idx"]) in self.layers_to_transform
        )

    def unmatched_targets(self, modules: frozenset[str]) -> tuple[str, ...]:
        """Return the entries of a ``target_modules`` list that none of the modules answers to."""
        if not isinstance(self.target_modules, tuple):
            return ()
        return tuple(
            entry
            for entry in self.target_modules
            if not any(is_listed(module, (entry,)) for module in modules)
        )


def matching_patterns(patterns: Mapping[str, Value], module: str, field: str = "pattern") -> dict[str, Value]:
    """Return the entries of a ``rank_pattern`` or ``alpha_pattern`` that match a module, in their order.

    PEFT uses the first. Its file format sorts the keys, so the order of training is lost: entries with
    different values are ambiguous, and the caller must refuse them.

    Example:
        >>> matching_patterns({"q_proj": 8, "layers.1.q_proj": 4}, "model.layers.0.q_proj")
        {'q_proj': 8}

    Reference:
        ``peft.utils.other.get_pattern_key`` (PEFT 0.21.2).
    """
    return {
        key: value
        for key, value in patterns.items()
        if match(field, rf"(.*\.)?({key})$", module, key) is not None
    }


def is_listed(module: str, names: Iterable[str]) -> bool:
    """Return True when a module's path is one of the names, or ends in one at a dot."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def is_saved(module: str, entry: str) -> bool:
    """Return True when an entry of ``modules_to_save`` means a module or one that holds it.

    Reference:
        ``peft.utils.other._set_trainable`` (PEFT 0.21.2), which asks for no dot before the entry.
    """
    parts = module.split(".")
    return any(".".join(parts[:n]).endswith(entry) for n in range(1, len(parts) + 1))


def _names(config: Mapping[str, Any], field: str) -> Names:
    """Return a field that holds a string, a list of strings or nothing."""
    value = config.get(field)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise TargetError(field, f"is {value!r}, expected a string or a list of strings")

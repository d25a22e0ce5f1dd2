"""Which modules an adapter targets, by PEFT's exact rule, from names alone.

PEFT's own functions need torch and a live model; these need neither, and the property tests hold them
against PEFT's on generated module trees.
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from lora_merge.peft_rules.patterns import TargetError, patterns_of
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

ALL_LINEAR = "all-linear"
"""PEFT's shorthand: every linear layer but the output embedding; any case."""

_MOST_DIGITS = 18
"""Of a layer's number; a longer one is that of no layer."""

Value = TypeVar("Value")
Names = str | tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class TargetRule:
    """The fields of a PEFT configuration that choose modules."""

    target_modules: Names
    exclude_modules: Names = None
    layers_to_transform: tuple[int, ...] | None = None
    """None means every layer; an empty list means the same to PEFT."""

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
            raise TargetError(
                "layers_to_transform", f"is {quoted(layers)}, expected a number or a list of numbers"
            )
        patterns = _names(config, "layers_pattern") or ()
        # An empty list of layers means all of them to PEFT, so it is None here.
        rule = cls(
            target_modules=_names(config, "target_modules"),
            exclude_modules=_names(config, "exclude_modules"),
            layers_to_transform=tuple(layers) if layers else None,
            layers_pattern=(patterns,) if isinstance(patterns, str) else patterns,
        )
        patterns_of("layers_pattern", rule.layers_pattern, "layer").check()
        if isinstance(rule.target_modules, str) and not rule.all_linear:
            patterns_of("target_modules", (rule.target_modules,), "whole").check()
        if isinstance(rule.exclude_modules, str):
            patterns_of("exclude_modules", (rule.exclude_modules,), "whole").check()
        return rule

    @property
    def all_linear(self) -> bool:
        """True for the ``"all-linear"`` shorthand, in any case."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def excludes(self, module: str) -> bool:
        """Return True when ``exclude_modules`` takes the module out."""
        excluded = self.exclude_modules
        if not excluded:
            return False
        if isinstance(excluded, str):
            return bool(patterns_of("exclude_modules", (excluded,), "whole").matching(module))
        return is_listed(module, _set_of(excluded))

    def learn(self, modules: Iterable[str]) -> None:
        """Match many modules against the regexes at once, which takes less time than one after the other.

        Raises:
            TargetError: that takes longer than the limit.
        """
        names = tuple(modules)
        for field, value in (
            ("target_modules", self.target_modules),
            ("exclude_modules", self.exclude_modules),
        ):
            if isinstance(value, str) and not (field == "target_modules" and self.all_linear):
                patterns_of(field, (value,), "whole").learn(names)
        if self.layers_to_transform is not None:
            patterns_of("layers_pattern", self.layers_pattern, "layer").learn(names)

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
            if self.all_linear:
                return True
            return bool(patterns_of("target_modules", (targets,), "whole").matching(module))
        known = _set_of(targets)
        if module in known:  # an exact path is not filtered by layer
            return True
        return is_listed(module, known) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        """Return True when ``layers_to_transform`` lets the module's layer through."""
        if self.layers_to_transform is None:
            return True
        # The lazy prefix finds the first number, the layer's, not an expert's.
        if self.layers_pattern:
            number = patterns_of("layers_pattern", self.layers_pattern, "layer").layer(module)
        else:
            found = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", module)
            number = found["idx"] if found else None
        if number is None or len(number) > _MOST_DIGITS:
            return False
        return int(number) in _set_of(self.layers_to_transform)

    def unmatched_targets(self, modules: frozenset[str]) -> tuple[str, ...]:
        """Return the entries of a ``target_modules`` list that match none of the modules."""
        if not isinstance(self.target_modules, tuple):
            return ()
        answered = listed_among(_set_of(self.target_modules), modules)
        return tuple(entry for entry in self.target_modules if entry not in answered)


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
    keys = tuple(patterns)
    return {keys[at]: patterns[keys[at]] for at in patterns_of(field, keys, "end").matching(module)}


def is_listed(module: str, names: Iterable[str]) -> bool:
    """Return True when a module's path is one of the names, or ends in one at a dot."""
    # A path has few endings and a set may have many names: look up the few.
    if isinstance(names, AbstractSet):
        return any(end in names for end in endings(module))
    return any(module == name or module.endswith(f".{name}") for name in names)


def listed_among(names: AbstractSet[str], modules: Iterable[str]) -> set[str]:
    """Return those of the names that some module's path is, or ends in at a dot."""
    return {end for module in modules for end in endings(module) if end in names}


def endings(path: str) -> Iterator[str]:
    """Yield a path, and what follows each of its dots."""
    yield path
    at = path.find(".")
    while at >= 0:
        yield path[at + 1 :]
        at = path.find(".", at + 1)


def is_saved(module: str, entry: str) -> bool:
    """Return True when an entry of ``modules_to_save`` means a module or one that holds it.

    Reference:
        ``peft.utils.other._set_trainable`` (PEFT 0.21.2), which asks for no dot before the entry.
    """
    return bool(saved_among(frozenset({entry}), (module,)))


def saved_among(entries: AbstractSet[str], modules: Iterable[str]) -> set[str]:
    """Return which entries of ``modules_to_save`` mean some module or one that holds it; as `is_saved`, for many."""
    # One slice for each length, so that many entries cost no more than few. PEFT asks for no dot before an entry.
    lengths = sorted({len(entry) for entry in entries})
    found: set[str] = set()
    for module in modules:
        for parent in _parents(module):
            ends = (parent[len(parent) - n :] for n in lengths if n <= len(parent))
            found.update(end for end in ends if end in entries)
    return found


def _parents(path: str) -> Iterator[str]:
    """Yield what precedes each dot of a path, and the path."""
    at = path.find(".")
    while at >= 0:
        yield path[:at]
        at = path.find(".", at + 1)
    yield path


@lru_cache(maxsize=32)
def _set_of(values: tuple[Value, ...]) -> frozenset[Value]:
    """Return a tuple's values as a set, which is kept: a rule is asked about thousands of modules."""
    return frozenset(values)


def _names(config: Mapping[str, Any], field: str) -> Names:
    """Return a field that may hold a string, a list of strings or nothing; a list as a tuple.

    Raises:
        TargetError: it holds something else.
    """
    value = config.get(field)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise TargetError(field, f"is {quoted(value)}, expected a string or a list of strings")

"""Modules of a model that an adapter changes, and which of its tensors belong to which."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lora_merge.peft_rules.kinds import PREFIX

BIAS_TYPES = frozenset({"BEFT", "GLORA", "IA3", "LN_TUNING", "ROAD"})
"""PEFT types whose merge changes the module's bias, where it has one, by themselves (PEFT 0.21.2).

``BEFT`` changes nothing else. Any type may change it when its config says so (``bias``, ``lora_bias``).
"""


class InjectionError(ValueError):
    """PEFT cannot inject this adapter into this model.

    Args:
        subject: the module, tensor or field at fault.
        sentence: what is wrong with it.
    """

    def __init__(self, subject: str, sentence: str) -> None:
        self.subject, self.sentence = subject, sentence
        super().__init__(f"{subject}: {sentence}")


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A module of the model that the adapter changes."""

    module: str
    """Its path in the model, as transformers names it."""

    parameters: tuple[str, ...]
    """The base module's own parameters, by their names in it, in order: ``("weight", "bias")``."""


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """Where a layer will be put, with the arguments that PEFT gave when it asked for the layer."""

    module: str
    base: Any
    """The module it wraps, on the meta device."""

    parent: Any
    name: str
    """Its attribute in the parent."""

    options: Mapping[str, Any]


def sort_by_module(
    names: Iterable[str], targets: Iterable[Target]
) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Return the names of an adapter's tensors by module, those that are shared, and those without a place.

    A tensor belongs to the deepest target that its name leads to.
    """
    modules = {target.module for target in targets}
    by_module: dict[str, list[str]] = {}
    shared: list[str] = []
    orphans: list[str] = []
    for name in names:
        if not name.startswith(PREFIX):
            (shared if name.startswith("base_model.") else orphans).append(name)
            continue
        # The deepest, since a target may be inside another (attention and its output projection).
        owner = next((path for path in parents(name.removeprefix(PREFIX)) if path in modules), None)
        if owner is None:
            orphans.append(name)
        else:
            by_module.setdefault(owner, []).append(name)
    return by_module, shared, orphans


def parents(path: str) -> Iterator[str]:
    """Yield the paths above a dotted path, the deepest first."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path

"""Parameters of a module that PEFT's layer needs beside the one that it changes, as factors of a delta.

A factor is a stored tensor. A parameter that is stored quantised is as many factors as it has parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from lora_merge.core.weight import Storage, Weight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.tensor import TensorRef

PLAIN = "base:"
"""What the role of a plain parameter begins with; its name follows."""

_PART = "part:"
"""What the role of a part begins with; the parameter's name and the part's own role follow, with a colon between."""

Coded = tuple[str, tuple[int, ...], Storage]
"""A parameter that is stored quantised: its name, its shape, and how it is stored."""

Factor = TypeVar("Factor")


def factors_of(parameters: Mapping[str, Weight]) -> tuple[dict[str, TensorRef], tuple[Coded, ...]]:
    """Return the factors of some parameters by role, and what it takes to decode those that are stored quantised."""
    factors: dict[str, TensorRef] = {}
    coded: list[Coded] = []
    for name, weight in parameters.items():
        if weight.plain is not None:
            factors[f"{PLAIN}{name}"] = weight.plain
        else:
            factors |= {f"{_PART}{name}:{role}": ref for role, ref in weight.parts.items()}
            coded.append((name, weight.shape, weight.storage))
    return factors, tuple(coded)


def parts_of(name: str, factors: Mapping[str, Factor]) -> dict[str, Factor]:
    """Return role → part of a parameter that is stored quantised; of stored tensors, or of loaded ones."""
    prefix = f"{_PART}{name}:"
    return {role.removeprefix(prefix): one for role, one in factors.items() if role.startswith(prefix)}

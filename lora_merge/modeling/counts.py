"""Counts of a ``config.json`` that no model has: transformers would build a module for each before anyone can look."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_LIMITS = (
    (re.compile(r"(^|_)(layers?|depths?|blocks|stages)$"), 4096),
    (re.compile(r"(^|_)experts$"), 16_384),
    (re.compile(r"^num_labels$"), 1_000_000),
)
"""Ends of a field's name → the most that it may count. The largest models have some two hundred layers and a thousand
experts in a layer."""

_MOST_MODULES = 1_000_000
"""The most that layers times experts may come to; each would be a module."""


class Excess(NamedTuple):
    """A field that counts more than any model has."""

    field: str
    """With the names of the tables that it is in, by dots."""

    value: int
    most: int


def excess_of(config: Mapping[str, Any]) -> Excess | None:
    """Return a field of a ``config.json`` that counts more than any model has; None where there is none.

    Example:
        >>> excess_of({"text_config": {"num_hidden_layers": 10**9}})
        Excess(field='text_config.num_hidden_layers', value=1000000000, most=4096)
    """
    largest = [1] * len(_LIMITS)
    for field, value in _numbers(config):
        for n, (ending, most) in enumerate(_LIMITS):
            if ending.search(field.rpartition(".")[2]):
                if value > most:
                    return Excess(field, value, most)
                largest[n] = max(largest[n], value)
    # Each may be within its limit, and the product beyond all reason.
    n_layers, n_experts, _ = largest
    if n_layers * n_experts > _MOST_MODULES:
        return Excess("layers × experts", n_layers * n_experts, _MOST_MODULES)
    return None


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield each whole number of a configuration with the dotted path of its field; a list's numbers have the list's."""
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        field, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{field}.{key}".lstrip("."), one) for key, one in value.items()]
        elif isinstance(value, list):
            waiting += [(field, one) for one in value if isinstance(one, int | dict | list)]
        # True is an int to Python, and counts nothing.
        elif isinstance(value, int) and not isinstance(value, bool):
            yield field, value

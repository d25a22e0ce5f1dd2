"""Which options of a request its output records: those that shape it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from lora_merge.requests.parsing import VERBS
from lora_merge.requests.table import fields_of

if TYPE_CHECKING:
    from lora_merge.requests.option import Option, Verb
    from lora_merge.requests.request import ConvertRequest, Request

_FIRST: Final[Mapping[Verb, tuple[str, ...]]] = {
    "merge": ("dtype", "max_shard_size", "device", "base_is"),
    "convert": ("format",),
}
"""Fields that a manifest names before the others. Manifests have had this order from the first on, and the same request
writes the same bytes."""


def recorded_options(verb: Verb) -> tuple[Option, ...]:
    """Return the options of a verb that shape its output, in the order in which a manifest names them."""
    first = _FIRST.get(verb, ())
    rows = [option for option in fields_of(verb) if option.recorded]
    return tuple(sorted(rows, key=lambda row: first.index(row.name) if row.name in first else len(first)))


def record_of(request: Request | ConvertRequest) -> dict[str, object]:
    """Return the options that shape the output of a request, as its manifest names them.

    Two requests to which this is the same make the same output of the same inputs.
    """
    found: dict[str, object] = {}
    for option in recorded_options(VERBS[type(request)]):
        value: Any = getattr(request, option.name)
        if option.recorded_with:
            is_told = option.recorded_with in found
        else:
            is_told = option.recorded == "always" or value != option.default
        if is_told:
            found[option.name] = list(value) if isinstance(value, tuple) else value
    return found

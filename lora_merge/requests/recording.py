"""The options that shape an output, as the manifest records them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
"""Fields that come first in a manifest. The order is that of the first release, so that the same request still writes the
same bytes."""


def recorded_options(verb: Verb) -> tuple[Option, ...]:
    """Return the options of a verb that shape its output, in the manifest's order."""
    first = _FIRST.get(verb, ())
    rows = [option for option in fields_of(verb) if option.recorded]
    return tuple(sorted(rows, key=lambda row: first.index(row.name) if row.name in first else len(first)))


def record_of(request: Request | ConvertRequest) -> dict[str, object]:
    """Return name → value of the options that shape a request's output, in the manifest's order.

    Requests with equal records make the same output from the same inputs.
    """
    options = recorded_options(VERBS[type(request)])
    values: dict[str, Any] = {option.name: getattr(request, option.name) for option in options}
    given = {option.name for option in options if values[option.name] != option.default}
    return {
        # JSON has no tuples.
        option.name: list(value) if isinstance(value := values[option.name], tuple) else value
        for option in options
        if (given.intersection(option.recorded_with) if option.recorded_with else _is_told(option, given))
    }


def _is_told(option: Option, given: Collection[str]) -> bool:
    return option.recorded == "always" or option.name in given

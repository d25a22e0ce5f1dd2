"""Values → a request. The table of options says how each value is parsed; its origin does not matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

from lora_merge.errors import RequestError
from lora_merge.requests.inputs import path_text
from lora_merge.requests.request import (
    ConvertRequest,
    ExtractRequest,
    InspectRequest,
    Request,
    VerifyRequest,
)
from lora_merge.requests.table import fields_of

if TYPE_CHECKING:
    from lora_merge.requests.option import Option, Verb

AnyRequest = TypeVar("AnyRequest", Request, VerifyRequest, InspectRequest, ConvertRequest, ExtractRequest)

REQUESTS: Final[Mapping[Verb, type]] = {
    "merge": Request,
    "verify": VerifyRequest,
    "inspect": InspectRequest,
    "convert": ConvertRequest,
    "extract": ExtractRequest,
}
"""The request whose fields are the options of a verb. `plan` makes those of `merge`."""

VERBS: Final[Mapping[type, Verb]] = {kind: verb for verb, kind in REQUESTS.items()}


def parse_values(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with those of the table parsed. None stays None, and no field is added.

    An option without a parser (a merge's output) keeps its value.

    Raises:
        RequestError: a value does not parse; it names the key.
    """
    parsed = dict(values)
    for option in fields_of(VERBS[kind]):
        if option.kind.parse is not None and parsed.get(option.name) is not None:
            parsed[option.name] = _parsed(option, parsed[option.name])
    return parsed


def parse_request(
    kind: type[AnyRequest], values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> AnyRequest:
    """Return a request: given values are parsed, other fields get their defaults.

    Args:
        kind: of request.
        values: by the names of its fields; None and ``()`` count as not given.
        defaults: values for required fields that may be left out here.

    Raises:
        RequestError: a value does not parse, or a field without a default is not given; it names the key.
    """
    # click gives an empty tuple for a repeatable option that was not given.
    given = {name: value for name, value in values.items() if value is not None and value != ()}
    fields = {**(defaults or {}), **given}
    fields = {**left_out(VERBS[kind], fields), **fields}
    for option in fields_of(VERBS[kind]):
        if option.name in given or (option.is_required and option.name not in fields):
            # A missing required field is parsed as None, so that its own parser says what is wrong.
            fields[option.name] = _parsed(option, values.get(option.name))
    return kind(**fields)


def left_out(verb: Verb, values: Mapping[str, Any]) -> dict[str, str]:
    """Return an empty text for each required field that need not be given, since another one is (`Option.instead`)."""
    return {
        option.name: ""
        for option in fields_of(verb)
        if option.instead and values.get(option.instead) and not values.get(option.name)
    }


def parse_keywords(
    kind: type[AnyRequest], verb: Verb, keywords: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> AnyRequest:
    """Return the request for a call of a Python function; unknown keywords are refused as Python does.

    Args:
        kind: of request.
        verb: the function that is called.
        keywords: its arguments, all by their names.
        defaults: as for `parse_request`.

    Raises:
        TypeError: the function has no such keyword.
        RequestError: a value does not parse; it names the field.
    """
    options = {option.python_name: option for option in fields_of(verb) if option.in_python}
    for keyword in keywords:
        if keyword not in options:
            # As Python reports it for its own functions.
            raise TypeError(f"{verb}() got an unexpected keyword argument {keyword!r}")
    values = {options[keyword].name: _listed(options[keyword], value) for keyword, value in keywords.items()}
    return parse_request(kind, values, defaults)


def _listed(option: Option, value: Any) -> Any:
    """Return a list or another iterable as a tuple, if the option takes several; one text stays a text."""
    if not option.kind.is_many or option.kind.accepts or isinstance(value, str):
        return value
    return tuple(value) if isinstance(value, Iterable) else value


def _parsed(option: Option, value: Any) -> Any:
    """Return the value of a field, parsed by its kind; a path without a parser is only checked.

    Raises:
        RequestError: it does not parse.
    """
    parse = option.kind.parse or (path_text if option.kind.is_path else None)
    try:
        return value if parse is None else parse(value)
    except ValueError as exc:
        raise RequestError("", 0, option.name, str(exc)) from exc

"""Request files: YAML → `Request`. Errors name the line and the key."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from lora_merge.errors import RequestError
from lora_merge.requests.parsing import REQUESTS, VERBS, AnyRequest, left_out, parse_values
from lora_merge.requests.request import Request
from lora_merge.requests.table import fields_of
from lora_merge.requests.yaml_file import key_lines, parse_yaml
from lora_merge.words import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic import TypeAdapter

    from lora_merge.requests.option import Verb

_HALF = re.compile("[\ud800-\udfff]")
"""Lone surrogates: Python's way to keep a file name that is not UTF-8. pydantic refuses them."""


def read_request(
    path: str, overrides: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> Request:
    """Return the request that a YAML file states.

    Args:
        path: the file. Paths in it are relative to the current directory, as on the command line.
        overrides: values that win over the file's.
        defaults: values over which the file's win.

    Raises:
        RequestError: the file is not YAML, or a key is unknown, repeated, missing or of the wrong type.
    """
    values, node = parse_yaml(path)
    lines = key_lines(path, node)
    # Later ones win.
    values = {**(defaults or {}), **values, **overrides}
    values |= left_out("merge", values)
    keys = [option.key for option in fields_of("merge")]
    for key in values:
        if key not in keys:
            raise RequestError(
                path, lines.get(key, 0), str(key), "unknown key for a merge", hint=close_hint(key, keys)
            )
    try:
        return validated(Request, parse_values(Request, values))
    except RequestError as exc:
        raise RequestError(path, lines.get(exc.key, 0), exc.key, exc.sentence, hint=exc.hint) from None


def validated(kind: type[AnyRequest], values: Mapping[str, Any]) -> AnyRequest:
    """Return a request, once the types of its values are checked.

    Args:
        kind: of request.
        values: parsed values, by the names of its fields.

    Raises:
        RequestError: a value is missing or of the wrong type; it names the key.
    """
    from pydantic import ValidationError

    checked = {key: _without_halves(value) for key, value in values.items()}
    try:
        text = json.dumps(checked, default=str, skipkeys=True)
        request: AnyRequest = _validator(VERBS[kind]).validate_json(text)
    except ValidationError as exc:
        # ``from None``: pydantic's errors repeat the values that they refuse, tokens included.
        first = exc.errors(include_url=False, include_context=False)[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "missing":
            raise RequestError("", 0, key, "is missing", hint=f"add it, or pass --{key}") from None
        is_secret = any(option.is_secret for option in fields_of(VERBS[kind]) if option.name == key)
        repeated = "" if is_secret else f" {shown(values.get(key))}:"
        raise RequestError("", 0, key, f"is{repeated} {first['msg'][0].lower()}{first['msg'][1:]}") from None
    # Names that are not UTF-8 were checked with a substitute; the request gets the originals.
    meant = {key: values[key] for key, value in checked.items() if value is not values[key]}
    listed: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in meant.items()
    }
    return replace(request, **listed)


def _without_halves(value: Any) -> Any:
    """Return a text, or a list of texts, without lone surrogates; the same object if there are none."""
    if isinstance(value, str):
        return _HALF.sub("?", value) if _HALF.search(value) else value
    if isinstance(value, list | tuple):
        items = [_without_halves(item) for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value


@cache
def _validator(verb: Verb) -> TypeAdapter[Any]:
    """Return pydantic's validator of a verb's request. Making one takes longer than checking a request."""
    from pydantic import TypeAdapter

    return TypeAdapter(REQUESTS[verb])


def close_hint(key: object, known: Sequence[str]) -> str:
    """Return a hint for an unknown key: the known key that is closest, or all of them."""
    close = difflib.get_close_matches(str(key), known, n=1)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"

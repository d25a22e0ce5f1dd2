"""Request files: YAML → `Request`, with errors that name the line and the key."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_merge.core.json_values import MOST_LEVELS
from lora_merge.errors import CheckpointError, RequestError
from lora_merge.io.named_file import read_named
from lora_merge.requests.parsing import VERBS, AnyRequest, parse_values
from lora_merge.requests.request import Request
from lora_merge.requests.table import fields_of
from lora_merge.words import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import yaml
    from pydantic import TypeAdapter

MAX_BYTES = 1_000_000
"""Of a file of requests: a batch of ten thousand jobs, each on a line. Python's YAML takes ten seconds for it."""

_MAX_VALUES = 200_000
"""Of all tables and lists in it, with those that aliases stand for."""

_MAX_CHARACTERS = 10_000
"""Of one value. A path may have 4096."""

_TOO_DEEP = f"has tables and lists in each other more than {MOST_LEVELS} deep, expected fewer"

_BY_CONSTRUCTORS = (ValueError, TypeError, LookupError, AttributeError, OverflowError)
"""What PyYAML lets through where a tag such as ``!!int`` or ``!!timestamp`` stands before something else."""

_HALF = re.compile("[\ud800-\udfff]")
"""In the name of a file that is not UTF-8; pydantic takes none."""

_VALIDATORS: dict[type, TypeAdapter[Any]] = {}


def read_request(
    path: str, overrides: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> Request:
    """Return the request in a YAML file.

    Args:
        path: the file. Paths in it are relative to the current directory, as on the command line.
        overrides: values that win over the file's.
        defaults: values over which the file's win.

    Raises:
        RequestError: the file is no YAML, or a key is unknown, repeated, missing or of the wrong type.
    """
    values, node = parse_yaml(path)
    lines = _key_lines(path, node)
    values = {**(defaults or {}), **values, **overrides}
    keys = [option.key for option in fields_of("merge")]
    for key in values:
        if key not in keys:
            raise RequestError(
                path, lines.get(key, 0), str(key), "is no key of a request", hint=close_hint(key, keys)
            )
    try:
        return validated(Request, parse_values(Request, values))
    except RequestError as exc:
        raise RequestError(path, lines.get(exc.key, 0), exc.key, exc.sentence, hint=exc.hint) from None


def validated(kind: type[AnyRequest], values: Mapping[str, Any]) -> AnyRequest:
    """Return a request of values that are parsed, once their types are right.

    Raises:
        RequestError: a value is missing, of the wrong type or no text; it names the key. What pydantic says of it is not
            kept, since its errors repeat what they refuse, tokens too.
    """
    from pydantic import ValidationError

    checked = {key: _without_halves(value) for key, value in values.items()}
    try:
        text = json.dumps(checked, default=str, skipkeys=True)
        request: AnyRequest = _validator(kind).validate_json(text)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False)[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "missing":
            raise RequestError("", 0, key, "is missing", hint=f"add it, or pass --{key}") from None
        is_secret = any(option.is_secret for option in fields_of(VERBS[kind]) if option.name == key)
        repeated = "" if is_secret else f" {shown(values.get(key))}:"
        raise RequestError("", 0, key, f"is{repeated} {first['msg'][0].lower()}{first['msg'][1:]}") from None
    meant = {key: values[key] for key, value in checked.items() if value is not values[key]}
    listed: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in meant.items()
    }
    return replace(request, **listed)


def _without_halves(value: Any) -> Any:
    """Return a text, or texts, as pydantic takes them; the same object where nothing is to be changed."""
    if isinstance(value, str):
        return _HALF.sub("?", value) if _HALF.search(value) else value
    if isinstance(value, list | tuple):
        items = [_without_halves(item) for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value


def _validator(kind: type[AnyRequest]) -> TypeAdapter[AnyRequest]:
    """Return pydantic's validator, which takes longer to make than a request takes to check."""
    from pydantic import TypeAdapter

    if kind not in _VALIDATORS:
        _VALIDATORS[kind] = TypeAdapter(kind)
    return _VALIDATORS[kind]


def close_hint(key: object, known: Sequence[str]) -> str:
    """Return what an unknown key may have been meant for."""
    close = difflib.get_close_matches(str(key), known, n=1)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"


def parse_yaml(path: str) -> tuple[dict[str, Any], yaml.MappingNode]:
    """Return the table in a YAML file, and its nodes, which know their lines.

    Raises:
        RequestError: it is no YAML, holds no table, or repeats a key.
    """
    import yaml

    text = _text(path)
    if yaml.SafeLoader.NON_PRINTABLE.search(text):
        raise RequestError(path, 0, "", "is not valid YAML (it has a control character)")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is not None:
            _check(path, node, set(), {})
        values = None if node is None else loader.construct_document(node)
    except RecursionError as exc:
        raise RequestError(path, 0, "", _TOO_DEEP) from exc
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        line = mark.line + 1 if mark else 0
        problem = str(getattr(exc, "problem", None) or exc).partition(" '")[0]  # it may quote a token
        raise RequestError(path, line, "", f"is not valid YAML ({problem})") from None
    except _BY_CONSTRUCTORS:  # its text may be a token
        sentence = "is not valid YAML (a value is not what its tag says, a date that is none, or a number of"
        raise RequestError(path, 0, "", f"{sentence} thousands of digits)") from None
    finally:
        loader.dispose()
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        held = {type(None): "nothing", list: "a list"}.get(type(values), "no table")
        raise RequestError(path, 1, "", f"holds {held}, expected a table of keys")
    return values, node


def _text(path: str) -> str:
    """Return the text of a file that the user names.

    Raises:
        RequestError: it cannot be read, is no regular file and no pipe, is too long, or no UTF-8.
    """
    try:
        text = read_named(path, MAX_BYTES).decode("utf-8")
    except CheckpointError as exc:
        wanted = f", expected {exc.wanted}" if exc.wanted else ""
        raise RequestError(path, 0, "", f"{exc.got}{wanted}") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise RequestError(path, 0, "", f"cannot be read ({exc})") from exc
    return text.replace("\r\n", "\n")


def _check(path: str, node: yaml.Node, within: set[int], sizes: dict[int, int]) -> int:
    """Return how many values a node stands for, with those that its aliases (``*``) stand for.

    Args:
        within: the tables and lists that a node lies in.
        sizes: of those that were looked at already; each is looked at once, however often it has an alias.

    Raises:
        RequestError: a table, at any depth, names a key twice, an alias stands for what it stands in, or a few
            lines stand for more values than a request can have.
    """
    import yaml

    line = node.start_mark.line + 1
    if id(node) in within:
        sentence = "has an alias (*) for a table or list that it stands in"
        raise RequestError(path, line, "", sentence, hint="write out what is meant")
    if len(within) > MOST_LEVELS:
        raise RequestError(path, line, "", _TOO_DEEP)
    if id(node) in sizes:
        return sizes[id(node)]
    if isinstance(node, yaml.ScalarNode) and len(node.value) > _MAX_CHARACTERS:
        sentence = f"has a value of {len(node.value)} characters, expected {_MAX_CHARACTERS} at most"
        raise RequestError(path, line, "", sentence)
    within.add(id(node))
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _key_lines(path, node)
        children = [value for _, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    size = 1 + sum(_check(path, child, within, sizes) for child in children)
    size += len(node.value) // 100 if isinstance(node, yaml.ScalarNode) else 0
    if size > _MAX_VALUES:
        sentence = f"stands for more than {_MAX_VALUES} values, with its aliases (*)"
        raise RequestError(path, line, "", sentence, hint="write out what is meant")
    within.remove(id(node))
    sizes[id(node)] = size
    return size


def _key_lines(path: str, node: yaml.MappingNode) -> dict[str, int]:
    lines: dict[str, int] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node.value, str):
            sentence = "has a table or a list as a key, expected a name"
            raise RequestError(path, key_node.start_mark.line + 1, "", sentence)
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in lines:
            raise RequestError(path, line, key, f"stands twice, first on line {lines[key]}")
        lines[key] = line
    return lines

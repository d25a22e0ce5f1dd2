"""YAML files of users: a table of keys with the line of each. Size, depth and aliases are limited."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lora_merge.errors import CheckpointError, RequestError
from lora_merge.storage.json_values import MOST_LEVELS
from lora_merge.storage.named_file import read_named

if TYPE_CHECKING:
    import yaml

MAX_BYTES = 1_000_000
"""Largest file. It has room for a batch of ten thousand jobs, one on each line; Python's YAML takes ten seconds for that."""

_MAX_VALUES = 200_000
"""Most values in all tables and lists, with aliases written out."""

_MAX_CHARACTERS = 10_000
"""Longest value. A path has at most 4096 characters."""

_PUNCTUATION = re.compile(r"[^']*(?:'[^\w'\\]{1,3}'[^']*)*")
"""A message that quotes nothing but punctuation: ``expected ',' or '}', but got ':'``."""

_TOO_DEEP = f"nests tables and lists more than {MOST_LEVELS} levels deep, expected fewer levels"

_BY_CONSTRUCTORS = (ValueError, TypeError, LookupError, AttributeError, OverflowError)
"""Errors that PyYAML does not wrap when a tag such as ``!!int`` or ``!!timestamp`` has an unsuitable value."""


def parse_yaml(path: str) -> tuple[dict[str, Any], yaml.MappingNode]:
    """Return the table in a YAML file, and its node, which knows the line of each key.

    Raises:
        RequestError: it is not YAML, holds no table, repeats a key, or exceeds a limit.
    """
    import yaml

    text = _text(path)
    if yaml.SafeLoader.NON_PRINTABLE.search(text):
        raise RequestError(path, 0, "", "is not valid YAML (it has a control character)")
    # Safe: the tags of YAML can construct no objects of Python.
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is not None:
            # Before anything is constructed: a few lines of aliases can expand to billions of values.
            _check(path, node, set(), {})
        values = None if node is None else loader.construct_document(node)
    except RecursionError as exc:
        raise RequestError(path, 0, "", _TOO_DEEP) from exc
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        line = mark.line + 1 if mark else 0
        hint = "check brackets, quotes and indentation there and in the line before"
        raise RequestError(path, line, "", f"is not valid YAML ({_problem(exc)})", hint=hint) from None
    except _BY_CONSTRUCTORS:  # its text may be a token
        sentence = "is not valid YAML (a value does not fit its tag, is not a valid date, or is a number of"
        raise RequestError(path, 0, "", f"{sentence} thousands of digits)") from None
    finally:
        loader.dispose()
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        held = {type(None): "nothing", list: "a list"}.get(type(values), "one value")
        hint = "write a key and its value in each line, such as `base: DIRECTORY`"
        raise RequestError(path, 1, "", f"contains {held}, expected a table of keys", hint=hint)
    return values, node


def _problem(exc: yaml.YAMLError) -> str:
    """Return what PyYAML says, without the text at fault, which may be a token. Punctuation stays."""
    problem = str(getattr(exc, "problem", None) or exc)
    return problem if _PUNCTUATION.fullmatch(problem) else problem.partition(" '")[0]


def _text(path: str) -> str:
    """Return the text of a file that the user names.

    Raises:
        RequestError: it cannot be read, is neither a regular file nor a pipe, is too long, or is not UTF-8.
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
    """Return how many values a node expands to, with its aliases (``*``) written out.

    Args:
        path: the file, for errors.
        node: a scalar, list or table.
        within: ids of the tables and lists around the node.
        sizes: id → result of the nodes that were checked already. Each is checked once, however many aliases it has.

    Raises:
        RequestError: a table at any depth repeats a key, an alias refers to a table or list that contains it, a value
            is too long, or the nodes expand to more values than a request can have.
    """
    import yaml

    # PyYAML counts lines from 0.
    line = node.start_mark.line + 1
    if id(node) in within:
        sentence = "has an alias (*) for a table or list that contains the alias"
        raise RequestError(path, line, "", sentence, hint="write the values out in full")
    if len(within) > MOST_LEVELS:
        raise RequestError(path, line, "", _TOO_DEEP)
    if id(node) in sizes:
        return sizes[id(node)]
    if isinstance(node, yaml.ScalarNode) and len(node.value) > _MAX_CHARACTERS:
        sentence = f"has a value of {len(node.value)} characters, expected at most {_MAX_CHARACTERS}"
        raise RequestError(path, line, "", sentence)
    within.add(id(node))
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        key_lines(path, node)
        children = [value for _, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    size = 1 + sum(_check(path, child, within, sizes) for child in children)
    # Long texts count more, so that aliases cannot multiply one into gigabytes.
    size += len(node.value) // 100 if isinstance(node, yaml.ScalarNode) else 0
    if size > _MAX_VALUES:
        sentence = f"expands to more than {_MAX_VALUES} values, because of its aliases (*)"
        raise RequestError(path, line, "", sentence, hint="write the values out in full")
    within.remove(id(node))
    sizes[id(node)] = size
    return size


def key_lines(path: str, node: yaml.MappingNode) -> dict[str, int]:
    """Return key → line of a table, counted from 1.

    Raises:
        RequestError: a key is a table or a list, or is repeated.
    """
    lines: dict[str, int] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node.value, str):
            sentence = "has a table or a list as a key, expected a name"
            raise RequestError(path, key_node.start_mark.line + 1, "", sentence)
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in lines:
            raise RequestError(path, line, key, f"is given twice; the first is on line {lines[key]}")
        lines[key] = line
    return lines

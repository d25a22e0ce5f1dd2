"""YAML files of users: a table of keys, with the line of each, in a file that is not too large."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.errors import CheckpointError, RequestError
from lora_merge.storage.json_values import MOST_LEVELS
from lora_merge.storage.named_file import read_named

if TYPE_CHECKING:
    import yaml

MAX_BYTES = 1_000_000
"""Of a file of requests: a batch of ten thousand jobs, each on a line. Python's YAML takes ten seconds for it."""

_MAX_VALUES = 200_000
"""Of all tables and lists in it, with those that aliases stand for."""

_MAX_CHARACTERS = 10_000
"""Of one value. A path may have 4096."""

_TOO_DEEP = f"has tables and lists in each other more than {MOST_LEVELS} deep, expected fewer"

_BY_CONSTRUCTORS = (ValueError, TypeError, LookupError, AttributeError, OverflowError)
"""What PyYAML lets through where a tag such as ``!!int`` or ``!!timestamp`` stands before something else."""


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
        key_lines(path, node)
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


def key_lines(path: str, node: yaml.MappingNode) -> dict[str, int]:
    """Return the line of each key of a table, counted from 1.

    Raises:
        RequestError: a key is a table or a list, or comes twice.
    """
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

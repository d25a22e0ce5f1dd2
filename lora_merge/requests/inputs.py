"""Values from Python and YAML → the texts and switches of a request: paths, adapters and their weights.

Python and YAML may pass any type. A value without a clear meaning is refused with a sentence, never dropped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_merge.core.tensor import LARGEST_FLOAT32
from lora_merge.words import quoted, shown

AdapterPath = str | os.PathLike[str]
AdapterPaths = AdapterPath | Mapping[AdapterPath, float] | Sequence[AdapterPath | tuple[AdapterPath, float]]
"""One adapter or several. A mapping of path → weight, or a pair of both, sets weights."""


def adapter_texts(value: object) -> tuple[str, ...]:
    """Return adapters as the command line names them: ``path``, or ``path:weight``.

    Accepts one path, a list of paths, a mapping of path → weight, and pairs of both in a list.

    Example:
        >>> adapter_texts({"style": 0.5, "facts": 1}), adapter_texts([("style", 0.5), "facts"])
        (('style:0.5', 'facts:1'), ('style:0.5', 'facts'))

    Raises:
        ValueError: no adapter is named, or an item is neither a path nor a pair with a weight.
    """
    if isinstance(value, Mapping):
        texts = [_weighted(path, weight) for path, weight in value.items()]
    elif isinstance(value, list | tuple):
        texts = [text for item in value for text in _item(item)]
    else:
        texts = [_adapter(value)]
    if not texts:
        raise ValueError("names no adapter, expected at least one")
    return tuple(texts)


def _item(item: object) -> Sequence[str]:
    """Return the texts of one item of a list: a path, a mapping, or a pair of a path and a weight."""
    if isinstance(item, Mapping):
        return adapter_texts(item)
    if isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[1], int | float):
        return [_weighted(*item)]
    return [_adapter(item)]


def _adapter(value: object) -> str:
    if isinstance(value, str | os.PathLike) and str(value):
        return os.fspath(value) if isinstance(os.fspath(value), str) else str(value)
    sentence = f"{shown(value)} is not an adapter"
    if isinstance(value, int | float):
        sentence += "; write a weight together with its path: {'PATH': " + repr(value) + "}"
    raise ValueError(f"{sentence}; expected a directory, or a directory and a weight: DIR:0.5")


def _weighted(path: object, weight: object) -> str:
    """Return ``path:weight``.

    Raises:
        ValueError: the path is not a path, or the weight is not a number.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        is_word = isinstance(weight, str) and not re.fullmatch(r"[\d.,+-]+", weight)
        # A table such as {token: …} looks like an adapter with its weight, so a text is not repeated.
        said = "a string as its weight" if is_word else f"the weight {shown(weight)}"
        raise ValueError(f"{_adapter(path)!r} has {said}, expected a number")  # noqa: TRY004 - as parsers raise
    # ``repr`` loses no digit of a float.
    return f"{_adapter(path)}:{weight!r}"


def checked_weight(text: str, weight: float) -> float:
    """Return a weight, once it is known to be finite in float32 and not 0.

    Args:
        text: what names adapter and weight.
        weight: as parsed.

    Raises:
        ValueError: it is not finite, or zero.
    """
    # Negated, so that NaN is refused too.
    if not abs(weight) <= LARGEST_FLOAT32:
        raise ValueError(
            f"{quoted(text)} has the weight {quoted(weight)}, expected a number that float32 can hold"
        )
    if weight == 0:
        raise ValueError(f"{text!r} has the weight 0, so it would change nothing; leave this adapter out")
    return weight


def path_text(value: object) -> str:
    """Return a path, or the name of a repo, as text. ``Path`` objects are accepted.

    Raises:
        ValueError: it is something else, bytes, or empty.
    """
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"is {shown(value)}, expected a path")  # noqa: TRY004 - as parsers raise
    text = os.fspath(value)
    if not isinstance(text, str):
        raise ValueError(f"is {shown(value)}, expected a path as a string, not as bytes")  # noqa: TRY004 - as parsers raise
    if not text.strip():
        raise ValueError("is empty, expected a path (check that the shell variable is set)")
    return text


def texts(value: object) -> tuple[str, ...]:
    """Return one text or a list of texts as a tuple.

    Raises:
        ValueError: an item is not a text.
    """
    found = tuple(value) if isinstance(value, list | tuple) else (value,)
    for text in found:
        if not isinstance(text, str):
            raise ValueError(f"has {shown(text)}, expected a string")  # noqa: TRY004 - as parsers raise
    return tuple(map(str, found))


def switch(value: Any) -> bool:
    """Return a Boolean as it is.

    Raises:
        ValueError: it is neither True nor False.
    """
    # A text such as ``"no"`` would count as true.
    if not isinstance(value, bool):
        raise ValueError(f"is {shown(value)}, expected true or false")  # noqa: TRY004 - as parsers raise
    return value

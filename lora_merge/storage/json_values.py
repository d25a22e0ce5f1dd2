"""Values that parse as JSON and that no field can hold: halves of characters, numbers beyond any float, endless nesting."""

from __future__ import annotations

import re
import sys
from typing import Any

_SUSPECT_ESCAPE = re.compile(
    rb"(?i)\\ud[89ab]..(?!\\ud[c-f])|(?<!\\ud[89ab]..)\\ud[c-f]|\\\\ud[89a-f]", re.DOTALL
)
"""Finds an escape that may be half of a character."""

# The largest float has 309 digits, so shorter numbers need no closer look.
_LONG_NUMBER = re.compile(rb"\d{308}")

MOST_LEVELS = 64
"""The most levels of nested tables and lists. Configurations have ten; Python's own functions fail at some hundred."""

_ALL_BUT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)

_LARGEST = int(sys.float_info.max)

_HALF = re.compile(r"[\ud800-\udfff]")
_HALF_BUT_BYTES = re.compile(r"[\ud800-\udc7f\udd00-\udfff]")
"""Python's names for files whose bytes are not UTF-8 have U+DC80 to U+DCFF in their place (PEP 383)."""

_SHOWN = 100
"""Characters of a text that a message repeats."""


class OddValueError(ValueError):
    """A value that no field can hold: where it is, what was found, what was expected."""

    def __init__(self, subject: str, got: str, wanted: str) -> None:
        self.subject, self.got, self.wanted = subject, got, wanted
        super().__init__(f"{subject}: {got}, expected {wanted}" if subject else f"{got}, expected {wanted}")


def check_values(text: bytes, value: Any, *, paths: bool = False) -> None:
    """Check the values of a parsed JSON text. A normal file costs searches of its bytes.

    Args:
        text: of the file.
        value: what it holds.
        paths: whether a text may be the name of a file that is not UTF-8.

    Raises:
        OddValueError: a text or a key holds half of a character (a lone surrogate, which UTF-8 cannot hold), a number
            is larger than any float, or tables and lists are nested too deeply.
    """
    # Strings may hold brackets. They are taken out only where the first look finds too many levels.
    if _is_deep(text) and _is_deep(_STRING.sub(b"", text)):
        raise OddValueError("", f"has tables and lists nested more than {MOST_LEVELS} deep", "fewer levels")
    # For nearly every file a search of its bytes is enough; no value is looked at.
    if not _is_suspect(text):
        return
    half = _HALF_BUT_BYTES if paths else _HALF
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        where, item = waiting.pop()
        if isinstance(item, dict):
            for key in item:
                _check_text(where, key, half, "has a key with")
            waiting += [
                (shown(f"{where}.{key[:_SHOWN]}".lstrip(".")), each) for key, each in reversed(item.items())
            ]
        elif isinstance(item, list):
            waiting += [(where, each) for each in reversed(item)]
        elif isinstance(item, str):
            _check_text(where, item, half, "holds")
        elif isinstance(item, int) and abs(item) > _LARGEST:
            digits = len(str(abs(item)))
            raise OddValueError(where, f"is a number of {digits} digits", "at most 308")


def _is_suspect(text: bytes) -> bool:
    """Return True when a text needs a closer look."""
    # Headers of safetensors are megabytes, without a backslash.
    return bool((b"\\" in text and _SUSPECT_ESCAPE.search(text)) or _LONG_NUMBER.search(text))


def _is_deep(text: bytes) -> bool:
    """Return True when more than `MOST_LEVELS` levels of brackets are nested: each round takes the innermost pairs
    out.
    """
    left = text.translate(None, _ALL_BUT_BRACKETS)
    for _ in range(MOST_LEVELS):
        if not left:
            return False
        left = left.replace(b"[]", b"").replace(b"{}", b"")
    return bool(left)


def is_text(text: str) -> bool:
    """Return True when UTF-8 can hold a text: it has no lone surrogate."""
    return _HALF.search(text) is None


def shown(text: str) -> str:
    """Return a text as messages show it: cut after 100 characters, halves of characters as escapes.

    Example:
        >>> shown("rank_pattern"), shown("\\ud800")
        ('rank_pattern', '\\\\ud800')
    """
    cut = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    return _HALF.sub(lambda match: f"\\u{ord(match[0]):04x}", cut)


def _check_text(where: str, text: str, half: re.Pattern[str], verb: str) -> None:
    found = half.search(text)
    if found is None:
        return
    raise OddValueError(
        where,
        f"{verb} half of a character, {shown(found[0])} (in {shown(text)!r})".replace("\\\\u", "\\u"),
        "text that UTF-8 can hold",
    )

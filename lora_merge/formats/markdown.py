"""Untrusted names in Markdown and YAML: they cannot become links, images, HTML, table cells or keys."""

from __future__ import annotations

import json
import re

from lora_merge.words import printable

_PLAIN = re.compile(r"[^\W_](?:[\w./ -]*[^\W_])?")
"""Text that Markdown shows unchanged: letters, digits, and signs that mean nothing between them."""

_LINKED = re.compile(r"www\.|__|--|  ", re.IGNORECASE)
"""Parts that become links, emphasis or dashes even in such text."""

_PLAIN_SCALAR = re.compile(r"[A-Za-z][\w.-]*(?:/[\w.-]*\w)?", re.ASCII)
_YAML_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
"""Plain scalars that YAML 1.1 does not read as text."""


def code(text: str, *, in_table: bool = False) -> str:
    """Return a text as inline code, in which no character has a meaning.

    Example:
        >>> print(code("a"), code("a`b|"), code("a|b", in_table=True))
        `a` ``a`b|`` `a\\|b`
    """
    text = printable(text) or " "
    # The fence has one backtick more than the longest run inside (CommonMark, code spans).
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    # CommonMark strips one space from both ends, so a backtick at an end does not touch the fence.
    space = " " if text.startswith("`") or text.endswith("`") else ""
    made = f"{fence}{space}{text}{space}{fence}"
    # In a table a bar ends the cell, even within code (GitHub's Markdown).
    return made.replace("|", "\\|") if in_table else made


def name(text: str) -> str:
    """Return a text as a name: unchanged where Markdown shows it unchanged, else as inline code.

    Example:
        >>> print(name("org/my-lora_v1"), name("<img src=x>"), name("www.example.org"))
        org/my-lora_v1 `<img src=x>` `www.example.org`
    """
    is_plain = _PLAIN.fullmatch(text) and not _LINKED.search(text) and printable(text) == text
    return text if is_plain else code(text)


def strong(text: str) -> str:
    """Return a name in bold; a name that is shown as code is not made bold."""
    shown = name(text)
    return f"**{shown}**" if shown == text else shown


def scalar(text: str) -> str:
    """Return a text as a YAML value on one line, quoted where YAML would read a plain one otherwise.

    Example:
        >>> print(scalar("org/model-1.5"), scalar("no"), scalar("a: b"))
        org/model-1.5 "no" "a: b"
    """
    is_plain = _PLAIN_SCALAR.fullmatch(text) and text.lower() not in _YAML_WORDS
    # A JSON string is a double-quoted YAML scalar.
    return text if is_plain else json.dumps(printable(text), ensure_ascii=False)

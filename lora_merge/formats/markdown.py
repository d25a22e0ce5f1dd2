"""Names of strangers in Markdown and YAML, where they stay names: no link, image, HTML, cell or key of their own."""

from __future__ import annotations

import json
import re

from lora_merge.words import printable

_PLAIN = re.compile(r"[^\W_](?:[\w./ -]*[^\W_])?")
"""What Markdown shows as it is: letters, digits, and signs that mean nothing between them."""

_LINKED = re.compile(r"www\.|__|--|  ", re.IGNORECASE)
"""What is made into links, emphasis and dashes all the same."""

_PLAIN_SCALAR = re.compile(r"[A-Za-z][\w.-]*(?:/[\w.-]*\w)?", re.ASCII)
_YAML_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
"""Plain scalars that are no texts (YAML 1.1)."""


def code(text: str, *, in_table: bool = False) -> str:
    """Return a text as code, in which nothing has a meaning.

    Example:
        >>> print(code("a"), code("a`b|"), code("a|b", in_table=True))
        `a` ``a`b|`` `a\\|b`
    """
    text = printable(text) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    made = f"{fence}{space}{text}{space}{fence}"
    return made.replace("|", "\\|") if in_table else made


def name(text: str) -> str:
    """Return a text to be read as a name: as it is where Markdown makes nothing of it, else as code.

    Example:
        >>> print(name("org/my-lora_v1"), name("<img src=x>"), name("www.example.org"))
        org/my-lora_v1 `<img src=x>` `www.example.org`
    """
    is_plain = _PLAIN.fullmatch(text) and not _LINKED.search(text) and printable(text) == text
    return text if is_plain else code(text)


def strong(text: str) -> str:
    """Return a name in bold; what is code stays that."""
    shown = name(text)
    return f"**{shown}**" if shown == text else shown


def scalar(text: str) -> str:
    """Return a text as a value in YAML, on one line.

    Example:
        >>> print(scalar("org/model-1.5"), scalar("no"), scalar("a: b"))
        org/model-1.5 "no" "a: b"
    """
    is_plain = _PLAIN_SCALAR.fullmatch(text) and text.lower() not in _YAML_WORDS
    return text if is_plain else json.dumps(printable(text), ensure_ascii=False)

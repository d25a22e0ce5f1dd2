"""What is secret, taken out of everything that is said: errors, reports, logs."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from lora_merge.words import printable, printable_json

if TYPE_CHECKING:
    from collections.abc import Iterable

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN")
"""Of the environment: where hubs' packages look for a token."""

_TOKEN = re.compile(r"\bhf_(?=[a-z]*[A-Z0-9]|[a-z]{30})[A-Za-z0-9]{16,}")
"""A token of the Hugging Face Hub. Names of folders begin with ``hf_`` too: those are shorter, or words."""

_CREDENTIALS = re.compile(r"(?<=://)[^/\s@'\"]+@")
"""User and password in a URL."""

_LEAST = 6
"""Characters of a token; what is shorter is a placeholder, and may be part of any word."""


def without_secrets(text: str, known: Iterable[str | None] = ()) -> str:
    """Return a text without tokens: those that look like one, those in the environment, and those that are known.

    Args:
        text: what is to be said.
        known: tokens that the caller has at hand.

    Example:
        >>> without_secrets("https://me:hunter2@host/org/name@hf_aBcDeFgHiJkLmNoPqRsT")
        'https://…@host/org/name@hf_…'
    """
    for token in (*known, *(os.environ.get(name) for name in VARIABLES)):
        if token and len(token.strip()) >= _LEAST:
            text = text.replace(token.strip(), "…")
    return _TOKEN.sub("hf_…", _CREDENTIALS.sub("…@", text))


def fit(text: str) -> str:
    """Return one line as it may leave, whoever wrote it: without tokens, and with everything visible."""
    return printable(without_secrets(text))


def fit_json(text: str) -> str:
    """Return JSON as it may leave: without tokens, and without any control character."""
    return printable_json(without_secrets(text))

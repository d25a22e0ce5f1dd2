"""Removes secrets from everything that is printed, reported or logged."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from lora_merge.words import printable, printable_json

if TYPE_CHECKING:
    from collections.abc import Iterable

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN")
"""Environment variables in which the packages of hubs look for a token."""

KEYS = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_CLIENT_SECRET",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
)
"""Environment variables in which the packages of object stores look for a secret."""

VARIABLES = (*TOKENS, *KEYS)

_TOKEN = re.compile(r"\bhf_(?=[a-z]*[A-Z0-9]|[a-z]{30})[A-Za-z0-9]{16,}")
"""A token of the Hugging Face Hub. Folder names that begin with ``hf_`` are shorter, or are words."""

_CREDENTIALS = re.compile(r"(?<=://)[^/\s@'\"]+@")
"""User and password in a URL."""

_LEAST = 6
"""Shortest token. Shorter values are placeholders, and might occur in any word."""


def without_secrets(text: str, known: Iterable[str | None] = ()) -> str:
    """Return a text without tokens: those that look like one, those in the environment, and known ones.

    Args:
        text: any text.
        known: further tokens, if the caller has any.

    Example:
        >>> without_secrets("https://me:hunter2@host/org/name@hf_aBcDeFgHiJkLmNoPqRsT")
        'https://…@host/org/name@hf_…'
    """
    # Known tokens need not look like one, so they are removed as they are.
    for token in (*known, *(os.environ.get(name) for name in VARIABLES)):
        if token and len(token.strip()) >= _LEAST:
            text = text.replace(token.strip(), "…")
    return _TOKEN.sub("hf_…", _CREDENTIALS.sub("…@", text))


def fit(text: str) -> str:
    """Return a text as one line fit to be printed: without tokens, and with control characters shown as text."""
    return printable(without_secrets(text))


def fit_json(text: str) -> str:
    """Return JSON fit to be printed: without tokens, and with control characters escaped."""
    return printable_json(without_secrets(text))

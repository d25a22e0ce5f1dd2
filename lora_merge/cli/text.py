"""Text for terminals: names of strangers made harmless, sizes made readable."""

from __future__ import annotations

import json
from collections.abc import Mapping

from lora_merge.redaction import without_secrets


def printable(text: str) -> str:
    """Return text without secrets, and with control characters made visible, so that a name cannot steer the terminal."""
    said = without_secrets(text)
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in said)


def json_text(data: Mapping[str, object]) -> str:
    """Return data for programs, without secrets."""
    return without_secrets(json.dumps(data, indent=2))


def size_text(nbytes: float) -> str:
    """Return bytes for people, in decimal units, as disks and shards count them.

    Example:
        >>> size_text(2_700_000_000)
        '2.70 GB'
    """
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"

"""Sizes in bytes as readable text."""

from __future__ import annotations


def size_text(nbytes: float) -> str:
    """Return a size in decimal units, as disks and shards use them.

    Example:
        >>> size_text(2_700_000_000)
        '2.70 GB'
    """
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"

"""Sizes such as ``5GB``, ``500MB`` and ``2GiB``."""

from __future__ import annotations

import re

from lora_merge.words import shown

_SIZE = re.compile(
    r"(?P<number>\d{1,15}(\.\d{1,9})?)\s*(?P<unit>[KMGT]?)(?P<binary>I?)(?P<byte>B?)", re.IGNORECASE
)


LEAST_BARE_BYTES = 10**6
"""A smaller number without a unit is refused: it was probably meant in another unit than bytes."""


def parse_size(text: str | float) -> int:
    """Return a size in bytes: ``5GB`` is 5·10⁹, ``5GiB`` is 5·2³⁰; a bare number is bytes, at least a million.

    Example:
        >>> parse_size("1.5GB"), parse_size("2KiB")
        (1500000000, 2048)

    Raises:
        ValueError: it is not a positive size, or a small number without a unit.
    """
    match = _SIZE.fullmatch(str(text).strip())
    size = 0
    if match is not None:
        # Decimal units as disks and shards use them; the ``i`` makes them binary.
        base = 1024 if match["binary"] else 1000
        size = int(float(match["number"]) * base ** " KMGT".index(match["unit"].upper() or " "))
        bare = not (match["unit"] or match["binary"] or match["byte"])
        if bare and float(match["number"]) and size < LEAST_BARE_BYTES:
            raise ValueError(
                f"{shown(text)} has no unit, and would mean {size} bytes: write {match['number']}MB or "
                f"{match['number']}GB"
            )
    if size <= 0:
        raise ValueError(f"{shown(text)} is not a size, expected for example 5GB, 500MB or 2GiB")
    return size

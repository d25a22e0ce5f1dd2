"""The colour scale of pictures, and the colour of text on it."""

from __future__ import annotations

VIRIDIS = (
    0x440154,
    0x482576,
    0x414487,
    0x355F8D,
    0x2A788E,
    0x21918C,
    0x22A884,
    0x42BE71,
    0x7AD151,
    0xBDDF26,
    0xFDE725,
)
"""Matplotlib's colour map at 0, 0.1, … 1."""


def _colour(share: float) -> tuple[int, int, int]:
    """Return red, green and blue, 0 to 255, for a place on the scale from 0 to 1. Other values are clipped.

    Example:
        >>> _colour(0.0), _colour(0.05), _colour(1.0)
        ((68, 1, 84), (70, 19, 101), (253, 231, 37))
    """
    place = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    # The last place belongs to the last interval.
    below = min(int(place), len(VIRIDIS) - 2)
    low, high = (VIRIDIS[n].to_bytes(3) for n in (below, below + 1))
    red, green, blue = (round(a + (b - a) * (place - below)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def hex_of(share: float) -> str:
    """Return the colour of a place on the scale, from 0 to 1, as ``#rrggbb``.

    Example:
        >>> hex_of(0.0)
        '#440154'
    """
    return f"#{bytes(_colour(share)).hex()}"


def ink_on(share: float) -> str:
    """Return black or white, whichever is readable on a place of the scale, from 0 to 1."""
    red, green, blue = _colour(share)
    # Luma of ITU-R BT.601.
    return "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else "#fff"

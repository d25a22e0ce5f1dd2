"""The colour scale of charts: ten steps, for light and for dark pages, and the ink that can be read on each."""

from __future__ import annotations

import math

N_STEPS = 10

LIGHT = (
    "#e4edf2",
    "#cfdfe9",
    "#b6cfde",
    "#9abed3",
    "#7cabc7",
    "#5f97b8",
    "#4582a7",
    "#2f6d94",
    "#1e577c",
    "#103f5e",
)
DARK = (
    "#1f2b34",
    "#243845",
    "#294657",
    "#2f556b",
    "#376780",
    "#447b97",
    "#5a92ae",
    "#77aac5",
    "#98c4dc",
    "#c0e0f1",
)


def step_of(value: float | None, low: float, high: float) -> int | None:
    """Return the step of a value, 0 to 9; None where there is no finite value. Values outside of the scale are clipped.

    Example:
        >>> step_of(0.0, 0, 1), step_of(0.55, 0, 1), step_of(7.0, 0, 1), step_of(None, 0, 1)
        (0, 5, 9, None)
    """
    if value is None or not math.isfinite(value):
        return None
    share = (value - low) / (high - low) if high > low else 1.0
    return min(max(int(share * N_STEPS), 0), N_STEPS - 1)


def luminance(colour: str) -> float:
    """Return the relative luminance of ``#rrggbb``, 0 to 1, as WCAG 2.2 defines it."""
    parts = (int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, 1 to 21, as WCAG 2.2 defines it.

    Example:
        >>> contrast("#000000", "#ffffff")
        21.0
    """
    low, high = sorted((luminance(one), luminance(other)))
    return round((high + 0.05) / (low + 0.05), 2)


def ink_on(colour: str) -> str:
    """Return black or white, whichever has the higher contrast on a colour. It is 4.58 at least."""
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, colour))

"""The picture of the idea: a row of weights between the lines of a grid, rounded in two ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rounded import rule
from rounded.svg import Drawing

if TYPE_CHECKING:
    from collections.abc import Sequence

BEFORE: Final = (1, 3, 2, 1, 0, 2, 1, 3, 2, 0, 1, 2)
"""W, in steps of the grid. The base is on the grid already."""

CHANGE: Final = 0.25
"""Δ of each weight, in steps. A has equal entries, so the adapter sees the sum of its inputs."""

DAMPING: Final = 0.03
LEVELS: Final = 5
_WIDTH, _HEIGHT = 760, 270
_PANEL, _GAP, _LEFT = 350, 30, 15
_TOP, _STEP = 54, 34


def rounded_rows() -> tuple[list[float], list[int], list[int]]:
    """Return what is wanted, and what both roundings store."""
    wanted = [level + CHANGE for level in BEFORE]
    direction = [len(BEFORE) ** -0.5] * len(BEFORE)
    return wanted, rule.nearest(wanted), rule.for_adapter(wanted, direction, DAMPING)


def picture() -> str:
    """Return the picture as SVG."""
    drawing = Drawing(
        _WIDTH,
        _HEIGHT,
        "Twelve weights on a grid. Rounding to nearest gives every weight back; rounding for the adapter moves three of them "
        "by a step, so that the sum changes as it should.",
    )
    wanted, nearest, adapter = rounded_rows()
    total = sum(wanted) - sum(BEFORE)
    _panel(drawing, _LEFT, "nearest", wanted, nearest, total)
    _panel(drawing, _LEFT + _PANEL + _GAP, "adapter", wanted, adapter, total)
    y = _HEIGHT - 8
    drawing.circle(_LEFT + 6, y - 4, 4, "open")
    drawing.text(_LEFT + 16, y, "wanted: W + Δ", "small")
    drawing.circle(_LEFT + 116, y - 4, 4, "nearest")
    drawing.text(_LEFT + 126, y, "stored, same as W", "small")
    drawing.circle(_LEFT + 246, y - 4, 4, "adapter")
    drawing.text(_LEFT + 256, y, "stored, moved by one step", "small")
    return drawing.finished()


def _panel(
    drawing: Drawing, left: float, method: str, wanted: Sequence[float], stored: Sequence[int], total: float
) -> None:
    drawing.text(left, 20, f"--rounding {method}", "bold")
    moved = sum(stored) - sum(BEFORE)
    drawing.text(left, 40, f"their sum should grow by {total:g} steps; it grows by {moved:g}")
    for level in range(LEVELS):
        y = _height(level)
        drawing.line((left, y), (left + _PANEL, y))
    space = _PANEL / len(wanted)
    for column, (before, value, chosen) in enumerate(zip(BEFORE, wanted, stored, strict=True)):
        x = left + (column + 0.5) * space
        drawing.line((x, _height(value)), (x, _height(chosen)), "dash")
        drawing.circle(x, _height(value), 4, "open")
        drawing.circle(x, _height(chosen), 5, "nearest" if chosen == before else "adapter")


def _height(level: float) -> float:
    return _TOP + (LEVELS - 1 - level) * _STEP + 10

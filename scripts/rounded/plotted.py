"""The pictures of what was measured: bars for each rounding, side by side, for every grid."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from statistics import mean
from typing import TYPE_CHECKING, Any, Final

from rounded.merging import ROUNDINGS
from rounded.svg import Drawing
from rounded.tables import NAMES, cases, size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence  # noqa: TC004 - types of fields, never evaluated

_WIDTH, _HEIGHT = 760, 320
_LEFT, _TOP, _BOTTOM = 52, 46, 262
_SHARE_OF_GROUP: Final = 0.75
_HIGHEST = 1.1


@dataclass(frozen=True, slots=True)
class Group:
    """The bars of one case."""

    grid: str
    delta: float
    shares: Mapping[str, Sequence[float]]
    """Rounding → what was measured, once or several times."""


def gains(rows: Sequence[dict[str, Any]]) -> str:
    """Return means over the adapters, and a dot for each, as SVG.

    Args:
        rows: of `rounded.models.rows`.
    """
    groups = [
        Group(grid, delta, {each: [row["gain_kept"][each] for row in found] for each in ROUNDINGS})
        for grid, delta, found in cases(rows)
    ]
    return _picture("Trained models: share of the adapter's gain that is kept", groups, 0)


def errors(rows: Sequence[dict[str, Any]]) -> str:
    """Return the errors of the adapter's effect, as SVG.

    Args:
        rows: of `rounded.grids.rows`.
    """
    groups = [
        Group(grid, delta, {row["rounding"]: [row["in_span"]] for row in found})
        for (grid, delta), found in groupby(rows, key=lambda row: (row["grid"], row["delta"]))
    ]
    return _picture("Random weights: error of the adapter's effect", groups, 1)


def _picture(title: str, groups: Sequence[Group], digits: int) -> str:
    drawing = Drawing(_WIDTH, _HEIGHT, title)
    drawing.text(_LEFT, 18, title, "bold")
    for number, rounding in enumerate(ROUNDINGS):
        x = _WIDTH - 275 + number * 95
        drawing.bar(x, 8, 12, 12, rounding)
        drawing.text(x + 18, 18, rounding, "small")
    for tenth in range(0, 11, 2):
        y = _height(tenth / 10)
        drawing.line((_LEFT, y), (_WIDTH - 8, y), "line" if tenth else "axis")
        drawing.text(_LEFT - 6, y + 4, f"{tenth * 10} %", "small end")
    space = (_WIDTH - 8 - _LEFT) / len(groups)
    width = space * _SHARE_OF_GROUP / len(ROUNDINGS)
    for column, group in enumerate(groups):
        middle = _LEFT + (column + 0.5) * space
        for number, rounding in enumerate(ROUNDINGS):
            _bar(drawing, middle + (number - 1) * width, width, rounding, group.shares[rounding], digits)
        drawing.text(middle, _BOTTOM + 20, NAMES[group.grid], "middle")
        drawing.text(middle, _BOTTOM + 37, f"Δ {size(group.delta)}", "small middle")
    return drawing.finished()


def _bar(
    drawing: Drawing, middle: float, width: float, rounding: str, shares: Sequence[float], digits: int
) -> None:
    shown = mean(shares)
    top = _height(_within(shown))
    drawing.bar(middle - width / 2 + 1, top, width - 2, _BOTTOM - top, rounding)
    above = min(_height(_within(share)) for share in (*shares, shown))
    words = f"{shown * 100:.{digits if shown < 0.1 else 0}f}"
    drawing.text(middle, above - 6, words, "small middle")
    for share in shares if len(shares) > 1 else ():
        drawing.circle(middle, _height(_within(share)), 1.6, "dot")


def _within(share: float) -> float:
    """Return a share as far as the picture shows it."""
    return min(max(share, 0.0), _HIGHEST)


def _height(share: float) -> float:
    return _BOTTOM - share / _HIGHEST * (_BOTTOM - _TOP)

"""Heat maps: rows of modules by columns of layers, as SVG whose cells can be focused and carry their values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING

from lora_merge.drawing.scale import step_of
from lora_merge.words import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEIGHT = 24
"""Of a row, in pixels."""

_WIDTH = 880
"""Pixels that the columns share, before the map gets a scroll bar."""

_NARROWEST, _WIDEST = 8, 52
"""Pixels of a column."""

_DIGIT = 6.7
"""Pixels of a character in a cell."""

_CLOSE = 0.9
"""Where a scale of shares that need a digit after the point begins."""

_GAP = 2
_LABEL = 30
"""Most characters of a row's label."""

_CHARACTER = 7.3
"""Pixels of a character of a label, in a monospaced font of 12 pixels."""


@dataclass(frozen=True)
class Cell:
    """One value of a heat map."""

    row: int
    column: int
    value: float | None
    """None where there is none: the cell is drawn hollow."""

    label: str
    """Everything that is known of it, for whoever points at it, or cannot see it."""

    is_marked: bool = False
    """True for a cell that is drawn with a cross: something is wrong with it."""


@dataclass(frozen=True)
class HeatMap:
    """One quantity, by row and column."""

    name: str
    """Its identifier in the page."""

    quantity: str
    """What the values are, in words."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[Cell, ...]
    low: float
    """Value at the pale end of the scale."""

    high: float
    is_share: bool = False
    """True for shares, which are shown as per cent."""

    @cached_property
    def by_place(self) -> dict[tuple[int, int], Cell]:
        """(row, column) → cell."""
        return {(one.row, one.column): one for one in self.cells}

    def text(self, value: float | None) -> str:
        """Return a value as a reader sees it."""
        if value is None:
            return "–"
        return f"{100 * value:.1f} %" if self.is_share else number_text(value)

    def short(self, value: float | None) -> str:
        """Return a value as a cell shows it."""
        if value is None or not math.isfinite(value):
            return self.text(value)
        if not self.is_share:
            return f"{value:.2g}" if abs(value) < 1 else f"{value:.3g}"
        # Where all are close to 100 %, their differences are behind the point.
        return f"{100 * value:.{int(self.low >= _CLOSE)}f}".removesuffix(".0")

    def step(self, cell: Cell) -> int | None:
        """Return the step of the colour scale that a cell is on, 0 to 9; None without a finite value."""
        return step_of(cell.value, self.low, self.high)

    @property
    def column_width(self) -> int:
        """Pixels from one column to the next."""
        return int(min(max(_WIDTH / max(len(self.columns), 1), _NARROWEST), _WIDEST))

    @cached_property
    def has_numbers(self) -> bool:
        """True where cells are wide enough to show their values."""
        longest = max((len(self.short(one.value)) for one in self.cells), default=0)
        return self.column_width >= longest * _DIGIT + _GAP + 4


def number_text(value: float) -> str:
    """Return a number with three digits that count, so that numbers below each other have the same length.

    Example:
        >>> number_text(0.022), number_text(16.0), number_text(1.5)
        ('0.0220', '16', '1.50')
    """
    return f"{value:g}" if not math.isfinite(value) or value == int(value) else f"{value:#.3g}"


def labels_svg(of: HeatMap) -> str:
    """Return the labels of the rows, which stay in sight when the cells are scrolled. Screen readers get them with each cell."""
    shown = [_shortened(printable(row)) for row in of.rows]
    width = int(max(map(len, shown), default=0) * _CHARACTER) + 12
    height = _HEIGHT * (len(of.rows) + 1)
    lines = [
        f'<svg class="labels" width="{width}" height="{height}" viewBox="0 0 {width} {height}" aria-hidden="true">'
    ]
    for n, (row, text) in enumerate(zip(of.rows, shown, strict=True)):
        y = _HEIGHT * (n + 1) + 16
        lines.append(f'<text x="0" y="{y}"><title>{_safe(row)}</title>{escape(text)}</text>')
    lines.append("</svg>")
    return "".join(lines)


def cells_svg(of: HeatMap) -> str:
    """Return the cells, with the columns' names above them. The first cell can be reached with the tab key."""
    width = of.column_width * len(of.columns)
    height = _HEIGHT * (len(of.rows) + 1)
    told = (
        f"{_safe(of.quantity)}: {len(of.rows)} rows, {len(of.columns)} columns; arrow keys move between cells"
    )
    lines = [
        f'<svg class="cells" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="group" aria-label="{told}">',
        '<g aria-hidden="true" class="heads">',
        *_heads(of),
        "</g>",
    ]
    lines += (_cell(of, one, is_first=n == 0) for n, one in enumerate(of.cells))
    lines.append("</svg>")
    return "\n".join(lines)


def _heads(of: HeatMap) -> Iterator[str]:
    """Yield names of columns, as many as have room."""
    longest = max(map(len, of.columns), default=1)
    every = max(1, -(-int(longest * _CHARACTER + 6) // of.column_width))
    for n, column in enumerate(of.columns):
        is_word = not column.isdigit()
        if n % every == 0 or is_word:
            x = of.column_width * n + of.column_width / 2
            yield f'<text x="{x:g}" y="16">{_safe(column)}</text>'


def _cell(of: HeatMap, cell: Cell, *, is_first: bool) -> str:
    step = of.step(cell)
    x, y = of.column_width * cell.column, _HEIGHT * (cell.row + 1)
    width, height = of.column_width - _GAP, _HEIGHT - _GAP
    kind = "none" if step is None else f"q{step}"
    value = "" if cell.value is None else repr(cell.value)
    inner = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="2"/>'
    middle = f'x="{x + width / 2:g}" y="{y + 15}"'
    if cell.is_marked:
        inner += f'<text class="mark" {middle}>✕</text>'
    elif of.has_numbers:
        inner += f"<text {middle}>{escape(of.short(cell.value))}</text>"
    marked = " marked" if cell.is_marked else ""
    return (
        f'<g class="{kind}{marked}" role="img" tabindex="{0 if is_first else -1}" data-r="{cell.row}" data-c="{cell.column}" '
        f'data-value="{value}" aria-label="{_safe(cell.label)}">{inner}</g>'
    )


def _safe(text: str) -> str:
    return escape(printable(text))


def _shortened(text: str) -> str:
    """Return a label that has room: its middle is left out.

    Example:
        >>> _shortened("a" * 20 + "b" * 20)
        'aaaaaaaaaaaaaa…bbbbbbbbbbbbbbb'
    """
    if len(text) <= _LABEL:
        return text
    half = _LABEL // 2
    return f"{text[: half - 1]}…{text[-half:]}"


def bar_svg(share: float) -> str:
    """Return a bar that fills this share of its cell, 0 to 1. The number beside it says the same."""
    width = 100 * min(max(share, 0.0), 1.0)
    return f'<svg class="bar" width="100%" height="8" aria-hidden="true"><rect width="{width:.2f}%" height="8" rx="1"/></svg>'

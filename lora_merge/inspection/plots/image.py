"""Draws the picture as PNG or SVG with matplotlib. Lengths are inches from the upper left corner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Literal

from lora_merge.inspection.plots.colours import hex_of, ink_on
from lora_merge.inspection.plots.grid import MOST_NUMBERED, OTHER, remarks_on, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lora_merge.inspection.facts import Inspection, ModuleFacts
    from lora_merge.inspection.plots.grid import Grid, Panel

_MONO_INCHES = 0.602 * 8 / 72
"""Width of a character in a row's label: DejaVu Sans Mono, 8 points."""

_MOST_CHARACTERS = 48
"""Most characters of a row's label."""

_MOST_INCHES = (40.0, 30.0)
"""Largest width and height of a panel's cells. If more would be needed, cells are smaller."""

_TITLE, _FOOT = 0.33, 0.45
"""Heights of a panel's title, above its cells, and of the layers' numbers, below them."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Positions of the parts of an image."""

    head: float
    """Height of the text above the panels."""

    left: float
    """Left edge of the cells."""

    cell: tuple[float, float]
    """Width and height of one cell."""

    cells: tuple[float, float]
    """Width and height of all cells of a panel."""

    n_panels: int

    @property
    def numbered(self) -> bool:
        """True if cells have room for numbers."""
        return self.cell[0] > 0.5 and self.cell[1] > 0.2

    @property
    def slot(self) -> float:
        """Height of a panel's cells, or of its legend if that is higher."""
        return max(self.cells[1], 0.8)

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the image, with room for titles."""
        width = max(self.left + max(self.cells[0] + 1.0, 2.8), 5.0)
        return width, self.head + self.n_panels * (_TITLE + self.slot + _FOOT)

    def box(self, left: float, n: int, size: tuple[float, float]) -> tuple[float, float, float, float]:
        """Return a rectangle at the height of panel n in matplotlib's terms: fractions of the image, from below."""
        top = self.head + n * (_TITLE + self.slot + _FOOT) + _TITLE
        width, height = self.size
        return left / width, 1 - (top + size[1]) / height, size[0] / width, size[1] / height


def _layout(grid: Grid[ModuleFacts], n_panels: int, n_lines: int) -> _Layout:
    """Return the layout of an image with some panels, below some lines of text."""
    n_rows, n_columns = len(grid.rows), len(grid.columns)
    wanted = 0.55 if n_columns <= MOST_NUMBERED else 0.21
    cell = min(wanted, _MOST_INCHES[0] / n_columns), min(0.27, _MOST_INCHES[1] / n_rows)
    longest = max(len(_drawn(label)) for label in grid.labels)
    return _Layout(
        head=0.3 + 0.2 * n_lines,
        left=0.3 + max(min(longest, _MOST_CHARACTERS), 8) * _MONO_INCHES,
        cell=cell,
        cells=(cell[0] * n_columns, cell[1] * n_rows),
        n_panels=n_panels,
    )


def image(inspection: Inspection, grid: Grid[ModuleFacts], panels: Sequence[Panel], form: str) -> bytes:
    """Return a PNG or SVG file. The user's settings of matplotlib do not affect it, and are restored."""
    import matplotlib.style
    from matplotlib.figure import Figure

    lines = [line for line in (inspection.adapter, summary(inspection), remarks_on(grid, panels)) if line]
    layout = _layout(grid, len(panels), len(lines))
    # No date, no version of matplotlib and a fixed salt for ids: the same inspection gives the same bytes.
    origin = {"Creator": "lora-merge", "Date": None} if form == "svg" else {"Software": None}
    file = BytesIO()
    with matplotlib.style.context(["default", {"svg.hashsalt": "lora-merge"}]):
        figure = Figure(figsize=layout.size, dpi=150)
        _draw_lines(figure, lines)
        for n, panel in enumerate(panels):
            axes = figure.add_axes(layout.box(layout.left, n, layout.cells))
            _draw_cells(axes, layout, panel)
            _name_rows_and_columns(axes, layout, grid)
            size = 0.13, min(layout.slot, 2.0)
            box = layout.box(layout.left + layout.cells[0] + 0.3, n, size)
            _draw_legend(figure, figure.add_axes(box), panel)
        figure.savefig(file, format=form, metadata=origin)
    return file.getvalue()


def _draw_lines(figure: Figure, lines: Sequence[str]) -> None:
    """Write the lines above the panels; the first one is larger."""
    width, height = figure.get_size_inches()
    for n, line in enumerate(lines):
        points, colour, top = (11, "black", 0.15) if n == 0 else (8, "#555555", 0.2 + 0.2 * n)
        most = int((width - 0.4) / (0.62 * points / 72))
        # A dollar sign in a name must not begin a formula.
        figure.text(
            0.2 / width,
            1 - top / height,
            _fitted(_drawn(line), most),
            fontsize=points,
            color=colour,
            verticalalignment="top",
            parse_math=False,
        )


def _draw_cells(axes: Axes, layout: _Layout, panel: Panel) -> None:
    """Draw a panel's cells, with numbers if there is room."""
    from matplotlib.collections import PolyCollection

    squares, colours = [], []
    for row, column in panel.values:
        share = panel.share((row, column))
        squares.append([(column, row), (column + 1, row), (column + 1, row + 1), (column, row + 1)])
        colours.append("#d5d7da" if share is None else hex_of(share))
        if layout.numbered:
            axes.text(
                column + 0.5,
                row + 0.5,
                panel.text((row, column)),
                color="#000" if share is None else ink_on(share),
                fontsize=7,
                horizontalalignment="center",
                verticalalignment="center",
            )
    # Lines between cells, thinner where cells are small.
    gap = min(0.8, 8 * min(layout.cell))
    axes.add_collection(PolyCollection(squares, facecolors=colours, edgecolors="white", linewidths=gap))
    axes.set_title(panel.title, fontsize=9, loc="left", pad=8)


def _name_rows_and_columns(axes: Axes, layout: _Layout, grid: Grid[ModuleFacts]) -> None:
    """Write names of modules and numbers of layers, or as many of them as fit."""
    n_rows, n_columns = len(grid.rows), len(grid.columns)
    axes.set_xlim(0, n_columns)
    # The first row is at the top.
    axes.set_ylim(n_rows, 0)
    # A label needs 0.13 inches. In lower rows, only some are named.
    every = math.ceil(0.13 / layout.cell[1])
    axes.set_yticks(
        [n + 0.5 for n in range(0, n_rows, every)],
        [_fitted(_drawn(label), _MOST_CHARACTERS) for label in grid.labels[::every]],
        fontsize=8,
        fontfamily="monospace",
        parse_math=False,
    )
    narrow = [column for column in grid.columns if layout.numbered or column != OTHER]
    every = math.ceil((0.062 * max(map(len, narrow), default=1) + 0.05) / layout.cell[0])
    axes.set_xticks([n + 0.5 for n in range(0, len(narrow), every)], narrow[::every], fontsize=7)
    axes.tick_params(length=0, pad=4)
    axes.spines[:].set_visible(False)
    _write_below(axes, 0, "layer", "right")
    if len(narrow) < n_columns:
        _write_below(axes, n_columns - 1, OTHER, "left")


def _write_below(axes: Axes, column: int, text: str, side: Literal["left", "right"]) -> None:
    """Write a text in the line of the layers' numbers. It ends (``right``) or begins (``left``) at a column's edge."""
    offset = 2 if side == "left" else -4
    axes.annotate(
        text,
        (column, 0),
        (offset, -4),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        fontsize=7,
        horizontalalignment=side,
        verticalalignment="top",
    )


def _draw_legend(figure: Figure, axes: Axes, panel: Panel) -> None:
    """Draw the colour scale with its values."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    scale = ListedColormap([hex_of(n / 255) for n in range(256)])
    legend = figure.colorbar(ScalarMappable(cmap=scale), cax=axes)
    shares, texts = zip(*panel.legend, strict=True)
    legend.set_ticks(shares, labels=texts)
    axes.tick_params(length=2, labelsize=7)
    axes.spines[:].set_visible(False)


def _drawn(text: str) -> str:
    """Return a text in printable ASCII."""
    # Fonts lack other characters.
    return "".join(char if char.isascii() and char.isprintable() else ascii(char)[1:-1] for char in text)


def _fitted(text: str, most: int) -> str:
    """Return a text, or the end of one that is too long.

    Example:
        >>> _fitted("some/long/path", 6)
        '…/path'
    """
    return text if len(text) <= most else f"…{text[1 - most :]}"

"""An inspection as a picture: ranks and norms by layer and module, as PNG, SVG or an HTML page.

The same inspection gives the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Literal

from lora_merge.core.inspection import ModuleFacts
from lora_merge.core.shortage import not_for_want_of_memory
from lora_merge.errors import RequestError
from lora_merge.io.files import write_error, write_text
from lora_merge.words import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lora_merge.core.inspection import Inspection

SUFFIXES = (".png", ".svg", ".html")
"""Of files that can be drawn."""

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.([0-9]{1,6})(?:\.|$)")
_EXPERT = re.compile(r"(?:^|(?<=\.))(\w*experts)\.[0-9]+(?=\.|$)")

_VIRIDIS = (
    0x440154, 0x482576, 0x414487, 0x355F8D, 0x2A788E, 0x21918C, 0x22A884, 0x42BE71, 0x7AD151, 0xBDDF26, 0xFDE725,
)  # fmt: skip
"""Matplotlib's colour map at 0, 0.1, … 1."""

_OTHER = "other"
"""The column of what is in no layer."""

_NO_VALUE = "–"

_MOST_NUMBERED = 16
"""Columns whose cells have room for numbers."""

_STYLE = """\
:root { color-scheme: light dark; --page: #fff; --text: #1c1e21; --faint: #62676d; --neutral: #d5d7da }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --text: #e6e8ea; --faint: #9aa0a6; --neutral: #45494e }
}
body {
  margin: 2rem; background: var(--page); color: var(--text); font: 14px/1.5 system-ui, sans-serif;
  print-color-adjust: exact
}
h1 { margin: 0; font-size: 1.25rem; overflow-wrap: anywhere }
h2 { margin: 2rem 0 .25rem; font-size: 1rem }
p { margin: 0; color: var(--faint); overflow-wrap: anywhere }
.map { overflow-x: auto }
.legend { width: 14rem; margin: .5rem 0; font-size: 12px; line-height: 1.3 }
.scale { height: .75rem; border-radius: 2px }
.stops { display: flex; justify-content: space-between }
table { border-collapse: separate; border-spacing: 2px; font-size: 12px; line-height: 1 }
th { font-weight: normal; color: var(--faint); padding: 2px; text-align: center }
th[scope=row] {
  position: sticky; left: 0; padding-right: .75rem; background: var(--page); color: var(--text);
  max-width: 48ch; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; text-align: left;
  font-family: ui-monospace, monospace
}
thead th:first-child { text-align: right; padding-right: .75rem }
td { min-width: 1.25rem; height: 1.5rem; padding: 0; border-radius: 2px; text-align: center }
.numbered td { min-width: 3.5rem }
td.neutral { background: var(--neutral); color: var(--text) }
td[title]:hover { outline: 2px solid var(--text) }
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser may load for the page: nothing."""


@dataclass(frozen=True, slots=True)
class _Row:
    """What is drawn in one line: a path without its layer number, experts folded."""

    head: str
    """What comes before the layer number; empty where there is none."""

    tail: str


@dataclass(frozen=True, slots=True)
class _Grid:
    """The modules, each in its place."""

    rows: tuple[_Row, ...]
    labels: tuple[str, ...]
    """Of the rows."""

    columns: tuple[str, ...]
    cells: Mapping[tuple[int, int], Sequence[ModuleFacts]]
    """By row and column; what the adapter does not have is missing."""


@dataclass(frozen=True, slots=True)
class _Panel:
    """One quantity, in every cell of the grid."""

    title: str
    values: Mapping[tuple[int, int], float | None]
    """By row and column; None where a module is there and the quantity is not."""

    top: float
    """What the end of the colour scale stands for; it begins at 0."""

    @property
    def has_neutral(self) -> bool:
        """Return True where a cell has no colour of the scale."""
        return any(self.share(place) is None for place in self.values)

    def share(self, place: tuple[int, int]) -> float | None:
        """Return where on the colour scale a cell is, from 0 to 1; None where it has no finite value."""
        value = self.values[place]
        return value / self.top if value is not None and math.isfinite(value) else None

    def text(self, place: tuple[int, int]) -> str:
        """Return the number of a cell."""
        value = self.values[place]
        return _NO_VALUE if value is None else _number(value)

    @property
    def legend(self) -> tuple[tuple[float, str], ...]:
        """Return places on the colour scale, and what they stand for."""
        return tuple((share, _number(share * self.top)) for share in (0.0, 0.5, 1.0))


def check(path: Path) -> None:
    """Refuse a file that cannot be drawn, before anything is worked out for it.

    Raises:
        RequestError: its suffix names no format, or the format needs matplotlib and that is not there.
    """
    wanted = "expected .png, .svg or .html"
    suffix = path.suffix.lower()
    if not suffix:
        raise RequestError("", 0, "plot", f"{path} has no suffix, {wanted}")
    if suffix not in SUFFIXES:
        raise RequestError("", 0, "plot", f"{path} is a {suffix} file, {wanted}")
    if suffix == ".html":
        return
    try:
        import matplotlib.figure
        import matplotlib.style  # noqa: F401
    except ImportError as exc:
        not_for_want_of_memory(exc)
        sentence = f"a {suffix} file is drawn by matplotlib, which cannot be imported ({exc})"
        hint = 'pip install "lora-merge[plot]", or name an .html file'
        raise RequestError("", 0, "plot", sentence, hint=hint) from exc


def draw(inspection: Inspection, path: Path) -> None:
    """Draw rank, and norms where they are known, as a heat map of layers and modules.

    Args:
        inspection: what is drawn.
        path: of the file; its suffix chooses the format.

    Raises:
        RequestError: there is nothing to draw, or no way to draw it (`check`).
        WriteError: the file cannot be written.
    """
    check(path)
    if not inspection.modules:
        raise RequestError(
            "", 0, "plot", f"{inspection.adapter} changes no module, so there is nothing to draw"
        )
    grid = _arranged(inspection.modules)
    panels = _panels(grid)
    if path.suffix.lower() == ".html":
        write_text(path, _page(inspection, grid, panels))
        return
    image = _image(inspection, grid, panels, path.suffix.lower()[1:])
    try:
        path.write_bytes(image)
    except OSError as exc:
        raise write_error(path, exc) from exc


def _arranged(modules: Sequence[ModuleFacts]) -> _Grid:
    """Return the grid: rows in the order in which they come up, layers by number, what has none at the end."""
    rows: dict[_Row, int] = {}
    by_place: dict[tuple[int, int | None], list[ModuleFacts]] = {}
    for module in modules:
        row, layer = _place(module.path)
        by_place.setdefault((rows.setdefault(row, len(rows)), layer), []).append(module)
    layers = sorted({layer for _, layer in by_place if layer is not None})
    with_others = any(layer is None for _, layer in by_place)
    columns: list[int | None] = [*layers, *([None] if with_others else [])]
    at = {layer: n for n, layer in enumerate(columns)}
    return _Grid(
        rows=tuple(rows),
        labels=_labels(list(rows)),
        columns=tuple(_OTHER if layer is None else str(layer) for layer in columns),
        cells={(row, at[layer]): found for (row, layer), found in by_place.items()},
    )


def _place(path: str) -> tuple[_Row, int | None]:
    """Return the row and the layer of a module.

    Example:
        >>> _place("model.layers.3.mlp.experts.17.up_proj")
        (_Row(head='model.layers', tail='mlp.experts.*.up_proj'), 3)
        >>> _place("lm_head")
        (_Row(head='', tail='lm_head'), None)
    """
    found = _LAYER.search(path)
    if found is None:
        return _Row("", _folded(path)), None
    return _Row(path[: found.start(1) - 1], _folded(path[found.end() :])), int(found[1])


def _folded(path: str) -> str:
    """Return a path that all experts of a layer share.

    Example:
        >>> _folded("mlp.experts.17.up_proj")
        'mlp.experts.*.up_proj'
    """
    return _EXPERT.sub(r"\1.*", path)


def _labels(rows: Sequence[_Row]) -> tuple[str, ...]:
    """Return what the rows are called, without what the paths to all layers begin with.

    Example:
        >>> _labels([_Row("model.layers", "mlp.up_proj"), _Row("", "model.embed_tokens"), _Row("", "lm_head")])
        ('mlp.up_proj', 'embed_tokens', 'lm_head')
        >>> _labels([_Row("model.text.layers", "mlp.up_proj"), _Row("model.vision.blocks", "qkv")])
        ('text.layers.mlp.up_proj', 'vision.blocks.qkv')
    """
    heads = [row.head.split(".") for row in rows if row.head] or [[]]
    shared = heads[0][: min(_n_shared(heads[0], head) for head in heads)]
    paths = [[part for part in (*row.head.split("."), *row.tail.split(".")) if part] for row in rows]
    return tuple(".".join(path[_n_shared(shared, path) :] or path[-1:]) for path in paths)


def _n_shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many parts of two paths are the same, from the beginning."""
    n_parts = min(len(one), len(other))
    return next((n for n in range(n_parts) if one[n] != other[n]), n_parts)


def _panels(grid: _Grid) -> list[_Panel]:
    """Return what is drawn: the rank, and the norms as far as they are known."""
    facts = [one for found in grid.cells.values() for one in found]
    panels = [_panel("rank", grid, lambda one: one.rank or None)]
    if any(one.relative is not None for one in facts):
        panels.append(_panel("relative change ‖Δ‖ / ‖W‖", grid, lambda one: one.relative))
    elif any(one.delta_norm is not None for one in facts):
        panels.append(_panel("change ‖Δ‖", grid, lambda one: one.delta_norm))
    return panels


def _panel(name: str, grid: _Grid, quantity: Callable[[ModuleFacts], float | None]) -> _Panel:
    """Return a panel; where all modules have the same value, its title says so."""
    values = {place: _mean(map(quantity, found)) for place, found in grid.cells.items()}
    finite = [value for value in values.values() if value is not None and math.isfinite(value)]
    different = {quantity(one) for found in grid.cells.values() for one in found}
    alike = f", {_number(finite[0])} everywhere" if finite and len(different) == 1 else ""
    return _Panel(name + alike, values, top=max(finite, default=0.0) or 1.0)


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of those that are known; one that overflows is infinite."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float) -> str:
    """Return a number as it stands in a cell or a legend.

    Example:
        >>> _number(16), _number(0.012345), _number(1234)
        ('16', '0.0123', '1234')
    """
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.4g}"


def _colour(share: float) -> tuple[int, int, int]:
    """Return red, green and blue of a place on the colour scale, from 0 to 1.

    Example:
        >>> _colour(0.0), _colour(0.05), _colour(1.0)
        ((68, 1, 84), (70, 19, 101), (253, 231, 37))
    """
    place = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    below = min(int(place), len(_VIRIDIS) - 2)
    low, high = (_VIRIDIS[n].to_bytes(3) for n in (below, below + 1))
    red, green, blue = (round(a + (b - a) * (place - below)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _hex(share: float) -> str:
    return f"#{bytes(_colour(share)).hex()}"


def _ink(share: float) -> str:
    """Return the colour of a number that can be read on a place of the colour scale."""
    red, green, blue = _colour(share)
    return "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else "#fff"


def _summary(inspection: Inspection) -> str:
    n_modules = len(inspection.modules)
    base = f", base {inspection.base}" if inspection.base else ""
    return printable(f"{inspection.kind}, {n_modules} module{'s' * (n_modules != 1)}{base}")


def _remarks(grid: _Grid, panels: Sequence[_Panel]) -> str:
    """Return what has to be known to read the picture; empty where every cell speaks for itself."""
    remarks = []
    if len(grid.cells) < len(grid.rows) * len(grid.columns):
        remarks.append("blank: no such module")
    if any(panel.has_neutral for panel in panels):
        remarks.append("grey: no value")
    if any(len(found) > 1 for found in grid.cells.values()):
        remarks.append("several modules, such as experts: their mean")
    return "; ".join(remarks)


# The page.


def _page(inspection: Inspection, grid: _Grid, panels: Sequence[_Panel]) -> str:
    """Return a page that needs nothing but itself."""
    name = escape(printable(inspection.adapter))
    tips = {place: _tooltip(found) for place, found in grid.cells.items()}
    remarks = _remarks(grid, panels)
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">',
        f"<title>{name}</title>",
        f"<style>\n{_STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{name}</h1>",
        f"<p>{escape(_summary(inspection))}</p>",
        *([f"<p>{escape(remarks)}</p>"] if remarks else []),
        *(line for panel in panels for line in _section(grid, panel, tips)),
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def _section(grid: _Grid, panel: _Panel, tips: Mapping[tuple[int, int], str]) -> list[str]:
    """Return the lines of one panel: its title, its legend and its table."""
    numbered = len(grid.columns) <= _MOST_NUMBERED
    stops = ", ".join(f"#{colour:06x}" for colour in _VIRIDIS)
    lines = [
        f"<h2>{escape(panel.title)}</h2>",
        '<div class="legend">',
        f'<div class="scale" style="background:linear-gradient(to right, {stops})"></div>',
        f'<div class="stops">{"".join(f"<span>{text}</span>" for _, text in panel.legend)}</div>',
        "</div>",
        f'<div class="map"><table class="{"numbered" if numbered else "plain"}">',
        "<thead><tr><th>layer</th>"
        + "".join(f'<th scope="col">{column}</th>' for column in grid.columns)
        + "</tr></thead>",
        "<tbody>",
    ]
    for n, label in enumerate(grid.labels):
        cells = [
            _cell(panel, (n, column), tips[n, column], numbered=numbered)
            if (n, column) in tips
            else "<td></td>"
            for column in range(len(grid.columns))
        ]
        name = escape(printable(label))
        lines.append(f'<tr><th scope="row" title="{name}">{name}</th>{"".join(cells)}</tr>')
    return [*lines, "</tbody>", "</table></div>"]


def _cell(panel: _Panel, place: tuple[int, int], tip: str, *, numbered: bool) -> str:
    """Return the cell of a module that is there."""
    text = panel.text(place) if numbered else ""
    share = panel.share(place)
    if share is None:
        return f'<td class="neutral" title="{escape(tip)}">{text}</td>'
    style = f"background:{_hex(share)}" + (f";color:{_ink(share)}" if numbered else "")
    return f'<td style="{style}" title="{escape(tip)}">{text}</td>'


def _tooltip(modules: Sequence[ModuleFacts]) -> str:
    """Return all that is known of a cell, line by line, its numbers as they are."""
    first = modules[0]
    lines = [printable(_folded(first.path) if len(modules) > 1 else first.path)]
    if len(modules) > 1:
        lines.append(f"{len(modules)} modules")
    lines += [
        printable(", ".join(dict.fromkeys(one.kind for one in modules))),
        _range("rank", [one.rank or None for one in modules]) or "no rank",
        _range("scale", [one.scale for one in modules]),
        _range("‖Δ‖", [one.delta_norm for one in modules]),
        _range("‖W‖", [one.weight_norm for one in modules]),
        _range("‖Δ‖ / ‖W‖", [one.relative for one in modules]),
    ]
    return "\n".join(line for line in lines if line)


def _range(name: str, values: Sequence[float | None]) -> str:
    """Return what is to be said of a quantity of several modules; nothing where none has it.

    Example:
        >>> _range("rank", [8, 16, None])
        'rank 8 to 16, mean 12.0, in 2 of 3'
        >>> _range("rank", [8, 8])
        'rank 8'
    """
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    differ = len(known) > 1 and low != high
    text = f"{name} {low!r}" + (f" to {high!r}, mean {_mean(known)!r}" if differ else "")
    return text if len(known) == len(values) else f"{text}, in {len(known)} of {len(values)}"


# The image. Lengths are inches, from the upper left corner.

_MONO_INCHES = 0.602 * 8 / 72
"""The width of a character of a row's label, which is set in DejaVu Sans Mono, 8 points."""

_MOST_CHARACTERS = 48
"""Of a row's label."""

_MOST_INCHES = (40.0, 30.0)
"""Of the cells of a panel; where they would need more, they are smaller."""

_TITLE, _FOOT = 0.33, 0.45
"""Heights: of a panel's title above its cells, and of the numbers of the layers below."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the parts of an image lie."""

    head: float
    """Height of the lines above the panels."""

    left: float
    """Where the cells begin."""

    cell: tuple[float, float]
    """Width and height."""

    cells: tuple[float, float]
    """Width and height of all."""

    n_panels: int

    @property
    def numbered(self) -> bool:
        """Return True where cells have room for numbers."""
        return self.cell[0] > 0.5 and self.cell[1] > 0.2

    @property
    def slot(self) -> float:
        """Return the height of a panel's cells or, where it is more, of its legend."""
        return max(self.cells[1], 0.8)

    @property
    def size(self) -> tuple[float, float]:
        """Return width and height of the image; there is room for its titles at least."""
        width = max(self.left + max(self.cells[0] + 1.0, 2.8), 5.0)
        return width, self.head + self.n_panels * (_TITLE + self.slot + _FOOT)

    def box(self, left: float, n: int, size: tuple[float, float]) -> tuple[float, float, float, float]:
        """Return a rectangle at the height of a panel's cells, in matplotlib's way: shares, from the lower left."""
        top = self.head + n * (_TITLE + self.slot + _FOOT) + _TITLE
        width, height = self.size
        return left / width, 1 - (top + size[1]) / height, size[0] / width, size[1] / height


def _layout(grid: _Grid, n_panels: int, n_lines: int) -> _Layout:
    """Return where everything lies, below so many lines of text."""
    n_rows, n_columns = len(grid.rows), len(grid.columns)
    wanted = 0.55 if n_columns <= _MOST_NUMBERED else 0.21
    cell = min(wanted, _MOST_INCHES[0] / n_columns), min(0.27, _MOST_INCHES[1] / n_rows)
    longest = max(len(_drawn(label)) for label in grid.labels)
    return _Layout(
        head=0.3 + 0.2 * n_lines,
        left=0.3 + max(min(longest, _MOST_CHARACTERS), 8) * _MONO_INCHES,
        cell=cell,
        cells=(cell[0] * n_columns, cell[1] * n_rows),
        n_panels=n_panels,
    )


def _image(inspection: Inspection, grid: _Grid, panels: Sequence[_Panel], form: str) -> bytes:
    """Return a PNG or SVG file, drawn with matplotlib's own settings; the user's are put back."""
    import matplotlib.style
    from matplotlib.figure import Figure

    lines = [line for line in (inspection.adapter, _summary(inspection), _remarks(grid, panels)) if line]
    layout = _layout(grid, len(panels), len(lines))
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
    """Write what stands above the panels, the first line larger."""
    width, height = figure.get_size_inches()
    for n, line in enumerate(lines):
        points, colour, top = (11, "black", 0.15) if n == 0 else (8, "#555555", 0.2 + 0.2 * n)
        most = int((width - 0.4) / (0.62 * points / 72))
        figure.text(
            0.2 / width, 1 - top / height, _fitted(_drawn(line), most),
            fontsize=points, color=colour, verticalalignment="top", parse_math=False,
        )  # fmt: skip


def _draw_cells(axes: Axes, layout: _Layout, panel: _Panel) -> None:
    """Draw the cells of a panel, and their numbers where there is room."""
    from matplotlib.collections import PolyCollection

    squares, colours = [], []
    for row, column in panel.values:
        share = panel.share((row, column))
        squares.append([(column, row), (column + 1, row), (column + 1, row + 1), (column, row + 1)])
        colours.append("#d5d7da" if share is None else _hex(share))
        if layout.numbered:
            axes.text(
                column + 0.5, row + 0.5, panel.text((row, column)), color="#000" if share is None else _ink(share),
                fontsize=7, horizontalalignment="center", verticalalignment="center",
            )  # fmt: skip
    gap = min(0.8, 8 * min(layout.cell))
    axes.add_collection(PolyCollection(squares, facecolors=colours, edgecolors="white", linewidths=gap))
    axes.set_title(panel.title, fontsize=9, loc="left", pad=8)


def _name_rows_and_columns(axes: Axes, layout: _Layout, grid: _Grid) -> None:
    """Write the modules and the numbers of the layers, or as many of them as fit."""
    n_rows, n_columns = len(grid.rows), len(grid.columns)
    axes.set_xlim(0, n_columns)
    axes.set_ylim(n_rows, 0)
    every = math.ceil(0.13 / layout.cell[1])
    axes.set_yticks(
        [n + 0.5 for n in range(0, n_rows, every)],
        [_fitted(_drawn(label), _MOST_CHARACTERS) for label in grid.labels[::every]],
        fontsize=8, fontfamily="monospace", parse_math=False,
    )  # fmt: skip
    narrow = [column for column in grid.columns if layout.numbered or column != _OTHER]
    every = math.ceil((0.062 * max(map(len, narrow), default=1) + 0.05) / layout.cell[0])
    axes.set_xticks([n + 0.5 for n in range(0, len(narrow), every)], narrow[::every], fontsize=7)
    axes.tick_params(length=0, pad=4)
    axes.spines[:].set_visible(False)
    _write_below(axes, 0, "layer", "right")
    if len(narrow) < n_columns:
        _write_below(axes, n_columns - 1, _OTHER, "left")


def _write_below(axes: Axes, column: int, text: str, side: Literal["left", "right"]) -> None:
    """Write a text in the line of the layers' numbers, beginning or ending where a column begins."""
    offset = 2 if side == "left" else -4
    axes.annotate(
        text, (column, 0), (offset, -4), xycoords=axes.get_xaxis_transform(), textcoords="offset points",
        fontsize=7, horizontalalignment=side, verticalalignment="top",
    )  # fmt: skip


def _draw_legend(figure: Figure, axes: Axes, panel: _Panel) -> None:
    """Draw what the colours stand for."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    scale = ListedColormap([_hex(n / 255) for n in range(256)])
    legend = figure.colorbar(ScalarMappable(cmap=scale), cax=axes)
    shares, texts = zip(*panel.legend, strict=True)
    legend.set_ticks(shares, labels=texts)
    axes.tick_params(length=2, labelsize=7)
    axes.spines[:].set_visible(False)


def _drawn(text: str) -> str:
    """Return a text in characters that every font has."""
    return "".join(char if char.isascii() and char.isprintable() else ascii(char)[1:-1] for char in text)


def _fitted(text: str, most: int) -> str:
    """Return the end of a text that is too long.

    Example:
        >>> _fitted("some/long/path", 6)
        '…/path'
    """
    return text if len(text) <= most else f"…{text[1 - most :]}"

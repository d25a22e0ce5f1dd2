"""Draws the picture as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from lora_merge.inspection.plots.colours import VIRIDIS, hex_of, ink_on
from lora_merge.inspection.plots.grid import MOST_NUMBERED, folded, mean, remarks_on, summary
from lora_merge.words import printable

if TYPE_CHECKING:
    from lora_merge.inspection.facts import Inspection, ModuleFacts
    from lora_merge.inspection.plots.grid import Grid, Panel

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
"""Content security policy: the page loads nothing. Names in it come from files of strangers."""


def page(inspection: Inspection, grid: Grid[ModuleFacts], panels: Sequence[Panel]) -> str:
    """Return a self-contained HTML page."""
    name = escape(printable(inspection.adapter))
    tips = {place: _tooltip(found) for place, found in grid.cells.items()}
    remarks = remarks_on(grid, panels)
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
        f"<p>{escape(summary(inspection))}</p>",
        *([f"<p>{escape(remarks)}</p>"] if remarks else []),
        *(line for panel in panels for line in _section(grid, panel, tips)),
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def _section(grid: Grid[ModuleFacts], panel: Panel, tips: Mapping[tuple[int, int], str]) -> list[str]:
    """Return the HTML lines of one panel: title, legend and table."""
    numbered = len(grid.columns) <= MOST_NUMBERED
    stops = ", ".join(f"#{colour:06x}" for colour in VIRIDIS)
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


def _cell(panel: Panel, place: tuple[int, int], tip: str, *, numbered: bool) -> str:
    text = panel.text(place) if numbered else ""
    share = panel.share(place)
    if share is None:
        return f'<td class="neutral" title="{escape(tip)}">{text}</td>'
    style = f"background:{hex_of(share)}" + (f";color:{ink_on(share)}" if numbered else "")
    return f'<td style="{style}" title="{escape(tip)}">{text}</td>'


def _tooltip(modules: Sequence[ModuleFacts]) -> str:
    """Return all facts about a cell, one on each line, with full precision."""
    first = modules[0]
    lines = [printable(folded(first.path) if len(modules) > 1 else first.path)]
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
    """Return a quantity of several modules in words; empty if none of them has it.

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
    text = f"{name} {low!r}" + (f" to {high!r}, mean {mean(known)!r}" if differ else "")
    return text if len(known) == len(values) else f"{text}, in {len(known)} of {len(values)}"

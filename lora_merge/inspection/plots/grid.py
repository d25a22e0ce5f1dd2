"""The grid of a picture: rows of modules, columns of layers, and the quantities in its cells."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from lora_merge.words import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lora_merge.inspection.facts import Inspection, ModuleFacts

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.([0-9]{1,6})(?:\.|$)")

_EXPERT = re.compile(r"(?:^|(?<=\.))(\w*experts)\.[0-9]+(?=\.|$)")

OTHER = "other"
"""Name of the column for modules outside of layers."""

_NO_VALUE = "–"

MOST_NUMBERED = 16
"""Most columns for which cells show numbers."""


class Located(Protocol):
    """Anything that has the path of a module."""

    @property
    def path(self) -> str:
        """The path, with the number of its layer."""


Item = TypeVar("Item", bound=Located)


@dataclass(frozen=True, slots=True)
class Row:
    """One row: a path without the number of its layer, with all experts as one."""

    head: str
    """The part before the number of the layer; empty if there is none."""

    tail: str


@dataclass(frozen=True)
class Grid(Generic[Item]):
    """All modules, each in its cell."""

    rows: tuple[Row, ...]
    labels: tuple[str, ...]
    """Labels of the rows."""

    columns: tuple[str, ...]
    cells: Mapping[tuple[int, int], Sequence[Item]]
    """(row, column) → modules. Cells without a module are missing."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One quantity, with its value in every cell."""

    title: str
    values: Mapping[tuple[int, int], float | None]
    """(row, column) → value; None if the module has no such quantity."""

    top: float
    """Value at the end of the colour scale, which begins at 0."""

    @property
    def has_neutral(self) -> bool:
        """True if a cell has no value on the colour scale."""
        return any(self.share(place) is None for place in self.values)

    def share(self, place: tuple[int, int]) -> float | None:
        """Return the place of a cell on the colour scale, from 0 to 1; None without a finite value."""
        value = self.values[place]
        return value / self.top if value is not None and math.isfinite(value) else None

    def text(self, place: tuple[int, int]) -> str:
        """Return a cell's value as text; a dash if there is none."""
        value = self.values[place]
        return _NO_VALUE if value is None else _number(value)

    @property
    def legend(self) -> tuple[tuple[float, str], ...]:
        """(place on the scale, label) for the legend."""
        return tuple((share, _number(share * self.top)) for share in (0.0, 0.5, 1.0))


def arranged(modules: Sequence[Item]) -> Grid[Item]:
    """Return the grid: rows in the order of the modules, columns by layer, then one for modules outside of layers."""
    rows: dict[Row, int] = {}
    by_place: dict[tuple[int, int | None], list[Item]] = {}
    for module in modules:
        row, layer = _place(module.path)
        # Rows are numbered in the order in which they come up.
        by_place.setdefault((rows.setdefault(row, len(rows)), layer), []).append(module)
    layers = sorted({layer for _, layer in by_place if layer is not None})
    with_others = any(layer is None for _, layer in by_place)
    columns: list[int | None] = [*layers, *([None] if with_others else [])]
    at = {layer: n for n, layer in enumerate(columns)}
    return Grid(
        rows=tuple(rows),
        labels=_labels(list(rows)),
        columns=tuple(OTHER if layer is None else str(layer) for layer in columns),
        cells={(row, at[layer]): found for (row, layer), found in by_place.items()},
    )


def _place(path: str) -> tuple[Row, int | None]:
    """Return the row and the layer of a module; None for a module outside of layers.

    Example:
        >>> _place("model.layers.3.mlp.experts.17.up_proj")
        (Row(head='model.layers', tail='mlp.experts.*.up_proj'), 3)
        >>> _place("lm_head")
        (Row(head='', tail='lm_head'), None)
    """
    found = _LAYER.search(path)
    if found is None:
        return Row("", folded(path)), None
    return Row(path[: found.start(1) - 1], folded(path[found.end() :])), int(found[1])


def folded(path: str) -> str:
    """Return a path with ``*`` in place of the expert's number.

    Example:
        >>> folded("mlp.experts.17.up_proj")
        'mlp.experts.*.up_proj'
    """
    return _EXPERT.sub(r"\1.*", path)


def _labels(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the labels of rows, without the beginning that all paths to layers share.

    Example:
        >>> _labels([Row("model.layers", "mlp.up_proj"), Row("", "model.embed_tokens"), Row("", "lm_head")])
        ('mlp.up_proj', 'embed_tokens', 'lm_head')
        >>> _labels([Row("model.text.layers", "mlp.up_proj"), Row("model.vision.blocks", "qkv")])
        ('text.layers.mlp.up_proj', 'vision.blocks.qkv')
    """
    heads = [row.head.split(".") for row in rows if row.head] or [[]]
    shared = heads[0][: min(_n_shared(heads[0], head) for head in heads)]
    paths = [[part for part in (*row.head.split("."), *row.tail.split(".")) if part] for row in rows]
    # A path that is shared completely keeps its last part.
    return tuple(".".join(path[_n_shared(shared, path) :] or path[-1:]) for path in paths)


def _n_shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the number of leading parts that two paths share."""
    n_parts = min(len(one), len(other))
    return next((n for n in range(n_parts) if one[n] != other[n]), n_parts)


def panels_of(grid: Grid[ModuleFacts]) -> list[Panel]:
    """Return the panels to draw: the rank, and relative or absolute norms if they are known."""
    facts = [one for found in grid.cells.values() for one in found]
    panels = [_panel("rank", grid, lambda one: one.rank or None)]
    if any(one.relative is not None for one in facts):
        panels.append(_panel("relative change ‖Δ‖ / ‖W‖", grid, lambda one: one.relative))
    elif any(one.delta_norm is not None for one in facts):
        panels.append(_panel("change ‖Δ‖", grid, lambda one: one.delta_norm))
    return panels


def _panel(name: str, grid: Grid[ModuleFacts], quantity: Callable[[ModuleFacts], float | None]) -> Panel:
    """Return a panel. If all modules have the same value, the title says so."""
    values = {place: mean(map(quantity, found)) for place, found in grid.cells.items()}
    finite = [value for value in values.values() if value is not None and math.isfinite(value)]
    different = {quantity(one) for found in grid.cells.values() for one in found}
    alike = f", {_number(finite[0])} everywhere" if finite and len(different) == 1 else ""
    # A top of 0 would divide by zero.
    return Panel(name + alike, values, top=max(finite, default=0.0) or 1.0)


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the known values; None if there is none, infinity after an overflow."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float) -> str:
    """Return a number with three or four significant digits.

    Example:
        >>> _number(16), _number(0.012345), _number(1234)
        ('16', '0.0123', '1234')
    """
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.4g}"


def summary(inspection: Inspection) -> str:
    """Return a line with kind, number of modules and base."""
    n_modules = len(inspection.modules)
    base = f", base {inspection.base}" if inspection.base else ""
    return printable(f"{inspection.kind}, {n_modules} module{'s' * (n_modules != 1)}{base}")


def remarks_on(grid: Grid[ModuleFacts], panels: Sequence[Panel]) -> str:
    """Return remarks that explain blank, grey and shared cells; empty if there are none."""
    remarks = []
    if len(grid.cells) < len(grid.rows) * len(grid.columns):
        remarks.append("blank: no such module")
    if any(panel.has_neutral for panel in panels):
        remarks.append("grey: no value")
    if any(len(found) > 1 for found in grid.cells.values()):
        remarks.append("several modules, such as experts: their mean")
    return "; ".join(remarks)

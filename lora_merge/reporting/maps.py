"""Heat maps and tables of modules: how large each change is, and how much of it the output keeps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.drawing.heat_map import Cell, HeatMap, number_text
from lora_merge.inspection.plots.grid import arranged, folded, mean
from lora_merge.peft_rules.method_names import method_name
from lora_merge.reporting.page import Bar, Chart, Table
from lora_merge.words import counted, listing

if TYPE_CHECKING:
    from lora_merge.core.tensor import Survival
    from lora_merge.inspection.facts import ModuleFacts
    from lora_merge.inspection.plots.grid import Grid


@dataclass(frozen=True, slots=True)
class Point:
    """What is known of the change of one module. None where it is not known."""

    path: str
    kind: str = ""
    rank: float | None = None
    relative: float | None = None
    """‖ΔW‖ / ‖W‖."""

    kept: float | None = None
    """Share of the change that arrived: ⟨Δ′, Δ⟩ / ‖Δ‖²."""

    effect: float | None = None
    """1 - ‖(Δ′ - Δ)Qᵀ‖ / ‖ΔQᵀ‖, 0 at least: what is left of the adapters' effect on what they see of their inputs."""

    off: float | None = None
    """‖Δ′ - Δ‖ / ‖Δ‖: how far the stored change is from the wanted one."""

    @property
    def facts(self) -> str:
        """Everything in one line, without the path."""
        parts = [
            self.kind,
            f"rank {self.rank:g}" if self.rank else "",
            _said("effect kept", self.effect, ".2%"),
            _said("change kept", self.kept, ".2%"),
            _said("‖ΔW‖/‖W‖", self.relative, ".3g"),
            _said("rounding error ‖ΔW′−ΔW‖/‖ΔW‖", self.off, ".2%"),
        ]
        return ", ".join(filter(None, parts))


def _said(name: str, value: float | None, spec: str) -> str:
    return "" if value is None else f"{name} {value:{spec}}"


_LAYER = re.compile(r"\.[0-9]+\.")


_WEIGHT = re.compile(r"\.(?:q?weight|weight_\w+)$")


def module_of(name: str) -> str:
    """Return the path of the module that a weight belongs to, however the weight is stored.

    Example:
        >>> module_of("layers.0.q_proj.weight"), module_of("layers.0.q_proj.weight_packed"), module_of("experts.up_proj")
        ('layers.0.q_proj', 'layers.0.q_proj', 'experts.up_proj')
    """
    return _WEIGHT.sub("", name)


def _ordered(points: Iterable[Point]) -> list[Point]:
    """Return points by their paths, those outside of layers last."""
    return sorted(points, key=lambda one: (_LAYER.search(one.path) is None, one.path))


def points_of_survival(survival: Mapping[str, Survival], ranks: Mapping[str, int]) -> list[Point]:
    """Return the points of a merge.

    Args:
        survival: of the merged tensors, by name.
        ranks: by parameter.
    """
    return _ordered(
        Point(
            path=module_of(name),
            rank=ranks.get(name),
            relative=one.relative if one.weight_norm else None,
            kept=one.kept if one.delta_norm else None,
            effect=max(0.0, 1 - one.effect_error / one.effect_norm) if one.effect_norm > 0 else None,
            off=one.lost if one.delta_norm else None,
        )
        for name, one in survival.items()
    )


def points_of_manifest(table: Mapping[str, Any]) -> list[Point]:
    """Return the points that a manifest recorded, by its JSON."""
    tensors = table.get("tensors")
    found = []
    for name, entry in tensors.items() if isinstance(tensors, dict) else ():
        delta = entry.get("delta") if isinstance(entry, dict) else None
        if isinstance(delta, dict):
            norm, wrong = _number(delta, "effect_norm"), _number(delta, "effect_error")
            found.append(
                Point(
                    path=module_of(name),
                    relative=_number(delta, "relative_norm"),
                    kept=_number(delta, "kept_share"),
                    effect=max(0.0, 1 - wrong / norm) if norm and wrong is not None else None,
                    off=_number(delta, "lost_share"),
                )
            )
    return _ordered(found)


def points_of_modules(modules: Sequence[ModuleFacts]) -> list[Point]:
    """Return the points of an inspection."""
    return _ordered(Point(one.path, method_name(one.kind), one.rank or None, one.relative) for one in modules)


def _number(table: Mapping[str, Any], key: str) -> float | None:
    value = table.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


_LOW_ENDS = (0.0, 0.5, 0.9, 0.99)
"""Where a scale of shares may begin; it ends at 1."""


def kept_chart(points: Sequence[Point], name: str) -> Chart | None:
    """Return the map of the effect that is kept; where that is not known of any, of the change that arrived; None without."""
    if any(one.effect is not None for one in points):
        quantity, of = "Effect kept", _effect
        caption = (
            "Share of the adapter's effect on its inputs that is left after rounding. 100 % is all of it."
        )
    elif any(one.kept is not None for one in points):
        quantity, of = "Change kept", _kept
        caption = "Share of the adapter's change that arrived in the stored weights. 100 % is all of it."
    else:
        return None
    grid = arranged(points)
    values = [value for value in map(of, points) if value is not None and math.isfinite(value)]
    low = max(end for end in _LOW_ENDS if end <= max(min(values, default=0.0), 0.0))
    return Chart(_map(name, quantity, grid, of, (low, 1.0), is_share=True), _explained(caption, grid))


def noise_chart(points: Sequence[Point], name: str) -> Chart | None:
    """Return the map of how far rounding moved the changes; None where that is not known of any."""
    values = [one.off for one in points if one.off is not None and math.isfinite(one.off)]
    if not values:
        return None
    grid = arranged(points)
    caption = (
        "Rounding noise relative to the change, ‖ΔW′−ΔW‖ / ‖ΔW‖. It is counted over all inputs; what the adapter "
        "sees of them has only part of it."
    )
    bounds = (0.0, max(values) or 1.0)
    return Chart(
        _map(name, "Rounding noise", grid, lambda one: one.off, bounds, is_share=True),
        _explained(caption, grid),
    )


def _effect(point: Point) -> float | None:
    return point.effect


def _kept(point: Point) -> float | None:
    return point.kept


def size_chart(points: Sequence[Point], name: str, marked: Collection[str] = ()) -> Chart | None:
    """Return the map of ‖ΔW‖ / ‖W‖; None where it is known of no module.

    Args:
        points: the modules.
        name: the identifier of the map.
        marked: paths of modules with which something is wrong.
    """
    known = [one.relative for one in points if one.relative is not None and math.isfinite(one.relative)]
    if not known and not marked:
        return None
    grid = arranged(points)
    caption = "Size of the change relative to the weight it changes, ‖ΔW‖ / ‖W‖."
    if marked:
        caption += " ✕: verification found an error in this module."
    bounds = (0.0, max(known, default=0.0) or 1.0)
    return Chart(
        _map(name, "Size of the change", grid, lambda one: one.relative, bounds, marked=marked),
        _explained(caption, grid),
    )


def rank_chart(points: Sequence[Point], name: str) -> Chart | None:
    """Return the map of ranks; None where all have the same, which a table says better."""
    ranks = {one.rank for one in points if one.rank}
    if len(ranks) < 2:
        return None
    grid = arranged(points)
    bounds = (0.0, max(ranks))
    return Chart(
        _map(name, "Rank", grid, lambda one: one.rank, bounds), _explained("Rank of each module.", grid)
    )


def _map(
    name: str,
    quantity: str,
    grid: Grid[Point],
    of: Callable[[Point], float | None],
    bounds: tuple[float, float],
    *,
    is_share: bool = False,
    marked: Collection[str] = (),
) -> HeatMap:
    cells, n_rows = [], _n_rows(grid)
    for (row, column), members in sorted(grid.cells.items()):
        if row < n_rows:
            value = mean(map(of, members))
            is_marked = any(one.path in marked for one in members)
            cells.append(Cell(row, column, value, _label(members, value, is_marked=is_marked), is_marked))
    return HeatMap(name, quantity, grid.labels[:n_rows], grid.columns, tuple(cells), *bounds, is_share)


_MOST_PLACES = 4000
"""Most places of a map, those without a module included: twice as many as 94 layers of 20 kinds of modules have."""


def _n_rows(grid: Grid[Point]) -> int:
    """Return how many rows a page has room for."""
    return min(len(grid.rows), max(1, _MOST_PLACES // max(len(grid.columns), 1)))


def _label(members: Sequence[Point], value: float | None, *, is_marked: bool) -> str:
    """Return everything that is known of a cell, in one line."""
    first = members[0]
    parts = [f"{folded(first.path)}: {counted(len(members), 'module')}"]
    if len(members) == 1:
        parts = [f"{first.path}: {first.facts or 'no value'}"]
    elif value is not None:
        parts.append(f"mean {value:.4g}")
    return ", ".join([*parts, *(["verification found an error here"] if is_marked else [])])


def _explained(caption: str, grid: Grid[Point]) -> str:
    """Return a caption with what explains hollow, missing and shared cells."""
    remarks = [caption]
    if any(len(found) > 1 for found in grid.cells.values()):
        remarks.append("Experts of a layer share a cell, which shows their mean.")
    if (n_rows := _n_rows(grid)) < len(grid.rows):
        remarks.append(f"The first {n_rows} of {len(grid.rows)} rows are shown.")
    return " ".join(remarks)


def kinds_table(points: Sequence[Point]) -> Table | None:
    """Return a table of the kinds of modules: how many, their ranks, and how large their changes are; None without modules."""
    if not points:
        return None
    grid = arranged(points)
    members_of: dict[int, list[Point]] = {}
    for (at, _), found in grid.cells.items():
        members_of.setdefault(at, []).extend(found)
    rows = [(label, members_of[row]) for row, label in enumerate(grid.labels[: _n_rows(grid)])]
    sizes = [mean(one.relative for one in members) for _, members in rows]
    finite = [size for size in sizes if size is not None and math.isfinite(size)]
    most = max(finite, default=0.0) or 1.0
    has_rank, has_size = any(one.rank for one in points), bool(finite)
    columns = ["Module", "Count", *(["Rank"] if has_rank else []), *(["Mean ‖ΔW‖/‖W‖"] if has_size else [])]
    cells: list[tuple[str | Bar, ...]] = []
    for (label, members), size in zip(rows, sizes, strict=True):
        row: list[str | Bar] = [label, str(len(members))]
        if has_rank:
            row.append(listing(dict.fromkeys(f"{one.rank:g}" for one in members if one.rank), 3) or "–")
        if has_size:
            share = size / most if size is not None and math.isfinite(size) else 0.0
            row.append(Bar("–" if size is None else number_text(size), share))
        cells.append(tuple(row))
    numeric = frozenset({1, 2} if has_rank else {1})
    return Table("Modules by kind", tuple(columns), tuple(cells), numeric, frozenset({0}))

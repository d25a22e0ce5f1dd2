"""The tables of docs/rounding.md, made of what was measured."""

from __future__ import annotations

from itertools import groupby
from statistics import mean
from typing import TYPE_CHECKING, Any, Final

from rounded.merging import ROUNDINGS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

Row = dict[str, Any]
Table = list[list[str]]
"""Lines of cells, the heads first."""

NAMES: Final = {
    "bf16": "BF16",
    "fp8": "FP8",
    "int4-g32": "INT4",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "nf4": "NF4",
}
"""Of the grids. They fit into 80 columns beside five numbers."""


def grids(rows: Sequence[Row]) -> Table:
    """Return what each rounding keeps of a change of a random matrix on a quantised base."""
    lines = [
        [NAMES[grid], size(delta), *_arrived(found), f"{found['adapter']['noise_of_base']:.2f}"]
        for grid, delta, found in _by_rounding(rows)
    ]
    return [["grid", "Δ std", *ROUNDINGS, "of q"], *lines]


def on_write(rows: Sequence[Row]) -> Table:
    """Return what each rounding keeps of a change of a random matrix that is quantised as it is written."""
    lines = [[scheme, size(delta), *_arrived(found)] for scheme, delta, found in _by_rounding(rows)]
    return [["scheme", "Δ std", *ROUNDINGS], *lines]


def _by_rounding(rows: Sequence[Row]) -> list[tuple[str, float, dict[str, Row]]]:
    """Return grid, size of the change, and rounding → row."""
    return [
        (grid, delta, {row["rounding"]: row for row in found})
        for (grid, delta), found in groupby(rows, key=lambda row: (row["grid"], row["delta"]))
    ]


def _arrived(found: Mapping[str, Row]) -> list[str]:
    """Return "kept / error in A, noise" of each rounding."""
    return [
        f"{row['kept']:.3f} / {row['in_span']:.4f}" + (f", {row['noise']:.2f}" if name != "nearest" else "")
        for name, row in found.items()
    ]


def trained(rows: Sequence[Row]) -> Table:
    """Return the losses on the adapters' task, and how much of their gain is kept: means over the seeds."""
    heads = ["grid", "Δ std", "base", "unmerged", *ROUNDINGS]
    lines = []
    for grid, delta, group in cases(rows):
        loss = _means(row["loss"] for row in group)
        gain = _means(row["gain_kept"] for row in group)
        merged = [f"{loss[rounding]:.3f} ({gain[rounding]:.1%})" for rounding in ROUNDINGS]
        lines.append([NAMES[grid], size(delta), f"{loss['base']:.3f}", f"{loss['unmerged']:.3f}", *merged])
    return [heads, *lines]


def plain(rows: Sequence[Row]) -> Table:
    """Return the losses on the task of the base: means over the seeds."""
    heads = ["grid", "Δ std", "base", "unmerged", *ROUNDINGS]
    lines = []
    for grid, delta, group in cases(rows):
        loss = _means(row["plain_loss"] for row in group)
        values = [f"{loss[name]:.3f}" for name in ("base", "unmerged", *ROUNDINGS)]
        lines.append([NAMES[grid], size(delta), *values])
    return [heads, *lines]


def off(rows: Sequence[Row]) -> Table:
    """Return the errors of the logits on the adapter's task, as shares of its effect: means over the seeds."""
    lines = []
    for grid, delta, group in cases(rows):
        error = _means(row["off"] for row in group)
        lines.append([NAMES[grid], size(delta), *(f"{error[rounding]:.3f}" for rounding in ROUNDINGS)])
    return [["grid", "Δ std", *ROUNDINGS], *lines]


def scaled(rows: Sequence[Row]) -> Table:
    """Return how much of an adapter's effect on the logits is kept in BF16, and the error."""
    lines = []
    for delta, found in groupby(rows, key=lambda row: float(row["delta"])):
        by_rounding = {row["rounding"]: row for row in found}
        cells = [
            f"{by_rounding[rounding]['kept']:.2f}, {by_rounding[rounding]['error']:.3f}"
            for rounding in ROUNDINGS
        ]
        lines.append([size(delta), *cells])
    return [["Δ std", *ROUNDINGS], *lines]


TABLES: Final = {
    "grids": ("grids", grids),
    "trained": ("trained", trained),
    "off": ("trained", off),
    "plain": ("trained", plain),
    "scaled": ("scaled", scaled),
    "on_write": ("on_write", on_write),
}
"""Name of a block of the page → what it is made of, and how."""


def cases(rows: Iterable[Row]) -> list[tuple[str, float, list[Row]]]:
    """Return grid, mean size of the change and the rows of each case of `rounded.models.CASES`."""
    found = []
    for (grid, _), group in groupby(rows, key=lambda row: (row["grid"], row["learning_rate"])):
        same = list(group)
        found.append((grid, mean(row["delta"] for row in same), same))
    return found


def size(value: float) -> str:
    """Return a small number as people write it.

    Example:
        >>> size(3e-05), size(0.0001), size(0.0000154)
        ('3e-5', '1e-4', '1.5e-5')
    """
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def markdown(table: Table) -> str:
    """Return a table as Markdown, numbers to the right."""
    n_words = 1 + (table[1][1] == "") if len(table) > 1 else 1
    rule = ["---"] * n_words + ["---:"] * (len(table[0]) - n_words)
    return "\n".join(f"| {' | '.join(line)} |" for line in (table[0], rule, *table[1:]))


def text(table: Table) -> str:
    """Return a table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )


def with_blocks(page: str, measured: Mapping[str, Any]) -> str:
    """Return a page with its tables renewed.

    Raises:
        ValueError: the markers of a table are not there once each.
    """
    for name, (source, make) in TABLES.items():
        begin, end = (
            f"<!-- {name}: begin (scripts/rounding.py --write) -->",
            f"<!-- {name}: end -->",
        )
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed or begin in after:
            raise ValueError(f"the page needs {begin} and {end}, once each and in this order")
        page = f"{before}{begin}\n\n{markdown(make(measured[source]))}\n\n{end}{after}"
    return page


def write_page(page: Path, measured: Mapping[str, Any]) -> None:
    """Renew the tables of a page."""
    page.write_text(with_blocks(page.read_text(), measured))


def _means(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    listed = list(rows)
    return {name: mean(row[name] for row in listed) for name in listed[0]}

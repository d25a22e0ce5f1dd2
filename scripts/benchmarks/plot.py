"""Time and peak memory against the size of the base, as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from benchmarks.results import Outcome, Results

Series = dict[str, list[tuple[float, float]]]
"""Points ``(GB, value)`` of each contender, by size."""

COLOURS = ("#4d4d4d", "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#000000")
"""Okabe and Ito's, which people tell apart however they see colours."""

MARKERS = "osD^vPX*"


def series(outcomes: list[Outcome], quantity: str) -> Series:
    """Return the medians of a quantity against size; of several cases of one size, the first."""
    made: dict[str, dict[float, float]] = {}
    for outcome in outcomes:
        for name in outcome.names():
            value = outcome.middle(name, quantity)
            if value is not None:
                made.setdefault(name, {}).setdefault(outcome.base_bytes / 1e9, value)
    return {name: sorted(points.items()) for name, points in made.items()}


def comparable(results: list[Results]) -> list[Outcome]:
    """Return the outcomes that differ in size only from the first."""
    outcomes = [outcome for each in results for outcome in each.outcomes]
    alike = [(each.case.dtype, each.case.targets, each.case.rank) for each in outcomes]
    return [outcome for outcome, key in zip(outcomes, alike, strict=True) if key == alike[0]]


def draw(results: list[Results], file: Path) -> None:
    """Draw what was measured into a PNG file; imports matplotlib.

    Raises:
        ValueError: there is nothing to draw.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    outcomes = comparable(results)
    if not outcomes:
        raise ValueError("there are no measurements to draw")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    draw_lines(left, series(outcomes, "wall_s"), "whole process, s")
    peaks = series(outcomes, "peak_rss_bytes")
    in_gb = {name: [(size, peak / 1e9) for size, peak in points] for name, points in peaks.items()}
    draw_lines(right, in_gb, "peak memory, GB")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    case = outcomes[0].case
    figure.suptitle(
        f"Merging a LoRA of rank {case.rank} (targets {case.targets}, {case.dtype}): medians", fontsize=11
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Software": None})
    plt.close(figure)


def draw_lines(axes: Axes, lines: Series, label: str) -> None:
    """Draw a line for every contender, its values on a logarithmic axis."""
    for number, (name, points) in enumerate(lines.items()):
        sizes, values = zip(*points, strict=True)
        look = number % len(COLOURS)
        axes.plot(
            sizes, values, color=COLOURS[look], marker=MARKERS[look], markersize=5, linewidth=1.5, label=name
        )
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set_xlabel("base, GB")
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)

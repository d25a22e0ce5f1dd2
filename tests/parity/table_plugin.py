"""Prints what the parity suite measured: with ``-v``, ``--kinds-table`` or ``--families-table``.

A test says what it is about in the property ``kind`` (name, model, dtype) or ``family`` (name, names of the
adapter, layout of the base), and in ``measured`` how far off it was; one that compares bits has nothing to measure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.parity.families import FAMILIES, LAYOUTS, NAMINGS
from tests.parity.kinds import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

Row = tuple[str, str, str, str]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    parser.addoption(
        "--kinds-table", action="store_true", help="Print the parity of every kind of adapter at the end."
    )
    parser.addoption(
        "--families-table",
        action="store_true",
        help="Print the parity of every family, by the adapter's names and the base's layout, at the end.",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the tables."""
    for subject, title, place in (
        ("kind", "parity, kind by kind", _place_of_kind),
        ("family", "parity, family by family", _place_of_family),
    ):
        option = {"kind": "--kinds-table", "family": "--families-table"}[subject]
        if config.getoption(option) or config.get_verbosity() >= 1:
            _print(terminalreporter, subject, title, place)


def _print(
    terminalreporter: pytest.TerminalReporter, subject: str, title: str, place: Callable[[Row], object]
) -> None:
    outcomes = ("passed", "failed", "skipped", "error")
    reports = [report for outcome in outcomes for report in terminalreporter.stats.get(outcome, ())]
    rows = sorted((row for report in reports for row in _rows(report, subject)), key=place)
    if not rows:
        return
    terminalreporter.section(title)
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())


def _rows(report: object, subject: str) -> list[Row]:
    """Return the row of a report: none if it is about something else."""
    found = dict(getattr(report, "user_properties", ()))
    if subject not in found:
        return []
    name, second, third = found[subject]
    outcome = getattr(report, "outcome", "")
    measured = str(found.get("measured", "the same bits"))
    return [(name, second, third, measured if outcome == "passed" else outcome)]


def _place_of_kind(row: Row) -> tuple[int, str, int]:
    """Return where a row stands: in the order of the list, float32 first."""
    names = [kind.name for kind in KINDS]
    return names.index(row[0]), row[1], ("float32", "bfloat16", "float16").index(row[2])


def _place_of_family(row: Row) -> tuple[int, int, int]:
    """Return where a row stands: in the order of the lists."""
    names = [family.name for family in FAMILIES]
    namings: tuple[str, ...] = NAMINGS
    layouts: tuple[str, ...] = LAYOUTS
    return names.index(row[0]), namings.index(row[1]), layouts.index(row[2])

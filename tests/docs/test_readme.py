"""The README is short, its figures are those of docs/performance.md, and the merge that it shows is a real one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = {
    "lora-merge": "ours-2w", "PEFT": "peft", "LLaMA-Factory": "llamafactory", "mergekit": "mergekit",
    "ms-swift": "ms-swift", "Axolotl": "axolotl", "Unsloth": "unsloth",
}  # fmt: skip
"""Tool in the README → contender in the table of other tools."""


def cells(line: str) -> list[str]:
    return [cell.strip(" *") for cell in line.strip("|").split("|")]


def measured() -> dict[str, list[str]]:
    """Return contender → its cells, of the table of other tools."""
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    table = page.partition("<!-- bench:peers -->")[2].partition("<!-- /bench:peers -->")[0]
    rows = [cells(line) for line in table.splitlines() if line.startswith("| ")]
    return {row[0]: row for row in rows}


def test_it_has_fewer_than_150_lines_and_begins_with_three_commands():
    block = README.partition("```sh\n")[2].partition("```")[0].splitlines()

    assert len(README.splitlines()) < 150
    assert [line.split()[0] for line in block] == ["uv", "lora-merge", "vllm"]
    assert README.index("```sh") < 700


@pytest.mark.parametrize("tool", ROWS)
def test_the_figures_of_a_tool_are_those_that_were_measured(tool):
    line = next(
        line
        for line in README.splitlines()
        if re.match(rf"\| (\*\*)?{re.escape(tool)}", line) and " MB" in line
    )
    _, seconds, memory, output = cells(line)
    found = measured()[ROWS[tool]]

    assert seconds == f"{float(found[2]):.1f} s"
    assert memory == f"{found[6]} MB"
    assert ("the same" in output) == ("the same 273 tensors, value for value" in found[7])


@pytest.mark.system
def test_the_merge_that_it_shows_prints_what_a_merge_prints():
    command = [sys.executable, str(ROOT / "scripts" / "first_merge.py"), "--check"]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr

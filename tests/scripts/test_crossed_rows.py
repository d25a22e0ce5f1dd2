"""Which rows are left to `make crossed`, by what each runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from covering import choosing, records

ROOT = Path(__file__).parents[2]


def test_a_row_is_left_out_where_the_others_run_all_that_it_runs():
    assert left_out(("t[a]", {1, 2}), ("t[b]", {1}), ("t[c]", {3})) == {"t[b]"}


def test_the_row_that_brings_the_most_for_its_time_is_kept():
    slow = records.Test("t[slow]", 5.0, frozenset({1, 2}), is_whole=True)
    quick = records.Test("t[quick]", 1.0, frozenset({1, 2}), is_whole=True)
    assert choosing.left_out([slow, quick], 0.1) == {"t[slow]"}


def test_rows_of_make_quick_stay():
    tests = rows(("t[a]", {1}), ("t[b]", {1}))
    assert choosing.left_out(tests, 0.1, ["t[b]"]) == {"t[a]"}
    assert choosing.left_out(tests, 0.1, ["t[a]"]) == {"t[b]"}


def test_every_table_keeps_a_row():
    assert left_out(("t[a]", {1}), ("other[a]", {1}), ("other[b]", {1})) in ({"other[a]"}, {"other[b]"})


@pytest.mark.parametrize(
    "kept",
    [
        records.Test("no_row", 1.0, frozenset({1}), is_whole=True),
        records.Test("t[short]", 0.01, frozenset({1}), is_whole=True),
        records.Test("t[starts a process]", 1.0, frozenset({1}), is_whole=False),
    ],
    ids=lambda test: test.name,
)
def test_what_saves_nothing_or_was_not_seen_stays(kept):
    assert kept.name not in choosing.left_out([kept, *rows(("t[a]", {1}), ("t[b]", {1}))], 0.1)


@pytest.mark.system
def test_what_is_recorded_is_what_each_test_runs(tmp_path):
    command = [sys.executable, ROOT / "scripts/crossed_rows.py", "record", tmp_path, "--jobs", "1", "--"]
    subprocess.run([*command, "tests/unit/test_mates.py"], cwd=ROOT, check=True, capture_output=True)

    tests = records.read(tmp_path)
    assert len(tests) > 1
    assert all(test.name.startswith("tests/unit/test_mates.py::") for test in tests)
    assert all(test.arcs for test in tests)
    assert all(test.is_whole for test in tests)


def rows(*arcs):
    return [records.Test(name, 1.0, frozenset(numbers), is_whole=True) for name, numbers in arcs]


def left_out(*arcs):
    return choosing.left_out(rows(*arcs), 0.1)

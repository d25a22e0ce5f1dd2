"""Which rows of a crossed table are tried by `make test`."""

from __future__ import annotations

from itertools import product

import pytest

from tests.crossing import diagonal, mark_listed, one_for_each


def is_plain(row):
    return not any(mark.name == "crossed" for mark in row.marks)


def test_the_first_row_with_anything_new_is_plain():
    rows = [pytest.param(*values, id="".join(values)) for values in product("ab", "xyz")]

    found = one_for_each(rows, lambda one, _: one, lambda _, other: other == "z")

    assert [row.id for row in found if is_plain(row)] == ["ax", "az", "bx"]
    assert [row.values for row in found] == [row.values for row in rows]


def test_a_diagonal_has_every_value_of_every_axis():
    rows = diagonal({"one": 1, "two": 2, "three": 3}, "ab", [False, True])

    plain = [row for row in rows if is_plain(row)]
    assert [row.id for row in plain] == ["one-a-False", "two-b-True", "three-a-False"]
    assert {row.values for row in rows} == set(product([1, 2, 3], "ab", [False, True]))
    assert len({row.id for row in rows}) == len(rows)


def test_an_axis_may_be_a_table_with_marks():
    slow = pytest.param(1, 2, id="both", marks=pytest.mark.slow)

    rows = diagonal([slow], "ab")

    assert [row.values for row in rows] == [(1, 2, "a"), (1, 2, "b")]
    assert [row.id for row in rows] == ["both-a", "both-b"]
    assert all("slow" in {mark.name for mark in row.marks} for row in rows)
    assert all(map(is_plain, rows))  # the shorter axis begins again


class Item:
    def __init__(self, nodeid):
        self.nodeid = nodeid
        self.marks = []

    def add_marker(self, mark):
        self.marks.append(mark.name)


def test_rows_that_are_listed_are_marked():
    items = [Item("tests/a.py::t[x]"), Item("tests/a.py::t[y]")]
    mark_listed(items, frozenset({"tests/a.py::t[y]", "tests/b.py::t[z]"}), are_all=True)
    assert [item.marks for item in items] == [[], ["crossed"]]


def test_a_row_that_is_listed_and_gone_is_named():
    items = [Item("tests/a.py::t[x]")]
    with pytest.raises(pytest.UsageError, match=r"tests/a\.py::t\[gone\] is not a row"):
        mark_listed(items, frozenset({"tests/a.py::t[gone]"}), are_all=True)
    mark_listed(items, frozenset({"tests/a.py::t[gone]"}), are_all=False)

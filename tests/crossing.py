"""Crossed tables: the rows that `make test` runs, and those that only `make crossed` runs.

A table that crosses kinds of adapters, models, layouts and dtypes runs the same code hundreds of times. One row for each thing
that has code of its own is enough to see it break. The other rows are marked ``crossed``: by the functions here, and by
``tests/crossed.txt``, which ``scripts/crossed_rows.py`` writes by what each row runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence
    from collections.abc import Set as AbstractSet

Axis = Mapping[str, Any] | Iterable[Any]
"""Values by their ids, or values whose texts are their ids."""


LISTED = Path(__file__).with_name("crossed.txt")
"""Names of rows that run no line and no branch which the other rows do not run."""


def mark_listed(items: Iterable[pytest.Item], names: AbstractSet[str], *, are_all: bool) -> None:
    """Mark the rows that are listed.

    Args:
        items: what was collected.
        names: of rows.
        are_all: whether whole files were collected, so that each of their names must be found.

    Raises:
        pytest.UsageError: a table has not the row that is listed for it.
    """
    found = {item.nodeid: item for item in items}
    for name in names & found.keys():
        found[name].add_marker(pytest.mark.crossed)
    tables = {name.partition("[")[0] for name in found}
    stale = sorted(name for name in names - found.keys() if name.partition("[")[0] in tables)
    if are_all and stale:
        raise pytest.UsageError(
            f"{LISTED}: {stale[0]} is not a row of its table (and {len(stale) - 1} more); take it out, or record the rows anew"
        )


def one_for_each(rows: Iterable[Any], *keys: Callable[..., Hashable]) -> list[Any]:
    """Mark as ``crossed`` every row of a table that has nothing new; rows are ``pytest.param(…)`` with ids.

    Args:
        rows: the whole table.
        keys: functions of a row's values; the first row with a value of any of them is not marked.
    """
    seen: set[Hashable] = set()
    found = []
    for row in rows:
        values = {(n, key(*row.values)) for n, key in enumerate(keys)}
        found.append(row if values - seen else _crossed(row))
        seen |= values
    return found


def only(plain: Iterable[str], names: Iterable[str]) -> list[Any]:
    """Return names as rows; those that are not in a sample are marked ``crossed``."""
    sample = frozenset(plain)
    rows = [pytest.param(name, id=name) for name in names]
    return [row if row.id in sample else _crossed(row) for row in rows]


def table(*axes: Axis) -> list[Any]:
    """Return every combination of the axes' values as rows. An axis may have rows of other tables."""
    return [_joined(rows) for rows in product(*map(_rows, axes))]


def diagonal(*axes: Axis) -> list[Any]:
    """Return every combination of the axes' values; all but a diagonal are marked ``crossed``.

    The n-th row of the diagonal has the n-th value of each axis, and shorter axes begin again: each value is in a row that is
    not marked.
    """
    columns = list(map(_rows, axes))
    plain = {tuple(n % len(rows) for rows in columns) for n in range(max(map(len, columns)))}
    places = product(*(range(len(rows)) for rows in columns))
    return [row if place in plain else _crossed(row) for place, row in zip(places, table(*axes), strict=True)]


def _rows(axis: Axis) -> list[Any]:
    """Return the values of an axis as rows."""
    named = axis.items() if isinstance(axis, Mapping) else ((str(value), value) for value in axis)
    return [value if hasattr(value, "marks") else pytest.param(value, id=name) for name, value in named]


def _joined(rows: Sequence[Any]) -> Any:
    values = [value for row in rows for value in row.values]
    return pytest.param(
        *values, id="-".join(row.id for row in rows), marks=[mark for row in rows for mark in row.marks]
    )


def _crossed(row: Any) -> Any:
    return pytest.param(*row.values, id=row.id, marks=(*row.marks, pytest.mark.crossed))

"""Crossed tables: the rows that `make test` runs, and those that only `make crossed` runs.

A table that crosses kinds of adapters, models, layouts and dtypes tries the same code hundreds of times. One row for each thing
that has code of its own is enough to see it break; the others are marked ``crossed``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable


def one_for_each(key: Callable[..., Hashable], rows: Iterable[Any]) -> list[Any]:
    """Mark as ``crossed`` every row of a table but the first of each key; rows are ``pytest.param(…)`` with ids.

    Args:
        key: what tells rows apart, of a row's values.
        rows: the whole table.
    """
    seen: set[Hashable] = set()
    found = []
    for row in rows:
        value = key(*row.values)
        marks = (*row.marks, pytest.mark.crossed) if value in seen else row.marks
        seen.add(value)
        found.append(pytest.param(*row.values, id=row.id, marks=marks))
    return found

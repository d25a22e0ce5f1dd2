"""Settings that contradict each other: two methods, two layouts in one table, a file beside ``config.json`` that says more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.core.report import error
from lora_merge.quantised.tables import SIDE_FILES, tables_of
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lora_merge.core.report import Issue
    from lora_merge.quantised.tables import Table

_CODE = "quantised"
_LAYOUT = ("checkpoint_format", "format")
_SAME = (("bits", "w_bit"), ("group_size", "q_group_size"), ("zero_point",), ("quant_algo",))
"""Settings that decide what values are, each with its names."""


def other_methods(settings: Mapping[str, Mapping[str, Any]]) -> list[Issue]:
    """Return an error for each table that names another method than the first one.

    Args:
        settings: what says how weights are quantised: place → table.
    """
    tables = [table for table in tables_of(settings) if table.method]
    hint = "remove the settings that do not belong to these weights"
    return [
        error(
            _CODE,
            table.place,
            f"names the method {table.method}, but {tables[0].place} names {tables[0].method}",
            hint,
        )
        for table in tables[1:]
        if table.method != tables[0].method
    ]


def contradictions(settings: Mapping[str, Mapping[str, Any]]) -> list[Issue]:
    """Return an error for each setting that has two values, in tables of one method.

    Args:
        settings: what says how weights are quantised: place → table.
    """
    tables = [table for table in tables_of(settings) if table.method]
    found = [(table, sentence) for table in tables for sentence in _layouts(table)]
    # A layout that contradicts itself is said already: it is not compared with other files.
    is_clear = not found
    for table in tables[1:]:
        if table.place in SIDE_FILES:
            found += [(table, sentence) for sentence in _differences(table, tables[0], is_clear=is_clear)]
    hint = "correct the wrong one, or download the checkpoint again"
    return [error(_CODE, table.place, sentence, hint) for table, sentence in found]


def _layouts(table: Table) -> Iterator[str]:
    """Yield what is wrong where GPTQ's layout has two names in one table."""
    named = [(key, table.values[key]) for key in _LAYOUT if table.values.get(key)]
    if table.method == "gptq" and len({_alike(value) for _, value in named}) > 1:
        (one, first), (other, second) = named
        yield f"{one} is {quoted(first)}, but {other} is {quoted(second)}"


def _differences(table: Table, first: Table, *, is_clear: bool) -> Iterator[str]:
    """Yield each setting of a file that differs from what the first table says; the layout only where that is clear."""
    for keys in (*_SAME, *((_LAYOUT,) if table.method == "gptq" and is_clear else ())):
        mine, other = _stated(table, keys), _stated(first, keys)
        if mine is not None and other is not None and _alike(mine[1]) != _alike(other[1]):
            yield f"{mine[0]} is {quoted(mine[1])}, but {other[0]} in {first.place} is {quoted(other[1])}"


def _stated(table: Table, keys: tuple[str, ...]) -> tuple[str, Any] | None:
    """Return a setting under the first of its names that says something, with that name."""
    found = ((key, table.values[key]) for key in keys if table.values.get(key) is not None)
    return next(found, None)


def _alike(value: object) -> str:
    """Return a value as it is compared: a group of 0 and of -1 is the whole line."""
    text = str(value).lower()
    return "-1" if text == "0" else text

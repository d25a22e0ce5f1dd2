"""Which rows run nothing of their own."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from covering.records import Test


def left_out(tests: Collection[Test], seconds: float, always: Collection[str] = ()) -> set[str]:
    """Return the names of rows that can be left out: the others run all that these run.

    Kept are tests that are not rows, rows that take less time than ``seconds``, rows that start processes, those named in
    ``always``, and at least one row of every table. Of the rest, those are kept that bring the most for their time.
    """
    kept = [
        test
        for test in tests
        if not test.is_row or test.seconds < seconds or not test.is_whole or test.name in always
    ]
    names = {test.name for test in kept}
    candidates = {test.name: test for test in tests if test.name not in names}
    covered = {arc for test in kept for arc in test.arcs}
    functions = {test.function for test in kept}
    # What a row brings only shrinks as others are kept, so the best is often still the best when it is looked at again.
    waiting = [(-_worth(test, covered, functions), name) for name, test in candidates.items()]
    heapq.heapify(waiting)
    while waiting and waiting[0][0] < 0:
        _, name = heapq.heappop(waiting)
        test = candidates[name]
        worth = -_worth(test, covered, functions)
        if waiting and worth > waiting[0][0]:
            heapq.heappush(waiting, (worth, name))
        elif worth < 0:
            del candidates[name]
            covered |= test.arcs
            functions.add(test.function)
    return set(candidates)


def _worth(test: Test, covered: set[int], functions: Collection[str]) -> float:
    """Return what a row brings for its time; the first row of a table brings its table."""
    return (len(test.arcs - covered) + (test.function not in functions)) / test.seconds


def summary(tests: Collection[Test], names: Collection[str]) -> str:
    """Return what leaving rows out saves, as a sentence."""
    saved = sum(test.seconds for test in tests if test.name in names)
    whole = sum(test.seconds for test in tests)
    n_arcs = len({arc for test in tests for arc in test.arcs})
    n_kept = len({arc for test in tests if test.name not in names for arc in test.arcs})
    return (
        f"{len(tests)} tests, {whole:.0f} s, {n_arcs} arcs; {len(names)} rows left out, "
        f"{whole - saved:.0f} s and {n_kept} arcs remain"
    )

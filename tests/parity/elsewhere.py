"""A second process that does the pieces of merges. It lasts as long as the tests do, so that it imports torch once."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from lora_merge.codecs import CODECS
from lora_merge.errors import BugError, LoraMergeError
from lora_merge.executors.processes import Broken, Crew
from tests.toys.codecs import TOYS, known

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.work import Done, Piece, WorkerSpec

Work = tuple[list[str], "WorkerSpec[Piece, Done]", "Sequence[Piece]"]
"""Names of the toy codecs that a test has made known, what makes the worker, and its pieces."""


def do(work: Work) -> tuple[list[Done], LoraMergeError | None]:
    """Do pieces, one after the other, until one fails. Runs in the second process."""
    toys, spec, pieces = work
    done: list[Done] = []
    try:
        with known(*toys), spec.make(1) as (worker,):
            for piece in pieces:
                done.append(worker(piece))  # noqa: PERF401 - what is done before an error counts
    except LoraMergeError as exc:
        return done, exc
    return done, None


def run(crew: Crew[Work, Any], spec: Any, pieces: Sequence[Any]) -> Any:
    """Yield the result of each piece, from the process of a crew of one.

    Raises:
        LoraMergeError: a piece failed.
        BugError: it failed in another way.
    """
    crew.begin(([name for name in TOYS if name in CODECS], spec, pieces))
    ((_, found),) = crew.results()
    if isinstance(found, Broken):
        raise BugError(found.kind, found.text, found.traceback)
    done, error = found
    for one in done:
        assert copied(one) == one
        yield one
    if error:
        raise error


def copied(value: Any) -> Any:
    """Return what comes out of a pickle of a value; it must be equal."""
    there = pickle.loads(pickle.dumps(value))
    assert there == value
    return there

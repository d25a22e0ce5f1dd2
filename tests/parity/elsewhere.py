"""A second process that does the pieces of merges. It lasts as long as the tests do, so that it imports torch once."""

from __future__ import annotations

import contextlib
import os
import pickle
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_merge.codecs import CODECS
from lora_merge.errors import BugError, LoraMergeError
from lora_merge.executors.processes import Broken, Crew
from tests.toys.codecs import TOYS, known

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_merge.core.work import Done, Piece, WorkerSpec


class Work(NamedTuple):
    """What the second process gets."""

    toys: list[str]
    """Names of the toy codecs that a test has made known."""

    spec: WorkerSpec[Piece, Done]
    pieces: Sequence[Piece]


class Found(NamedTuple):
    """What it gives back."""

    pid: int
    done: list[Done]
    error: LoraMergeError | None
    """What ended it before the last piece."""


class SecondProcess:
    """The process, as tests see it.

    Args:
        crew: of one process.
    """

    def __init__(self, crew: Crew[Work, Found]) -> None:
        self._crew = crew
        self.n_pieces = 0
        """How many pieces it has done."""

    def __call__(self, spec: Any, pieces: Sequence[Any]) -> Iterator[Done]:
        """Yield the result of each piece.

        Raises:
            LoraMergeError: a piece failed.
            BugError: it failed in another way.
        """
        self._crew.begin(Work([name for name in TOYS if name in CODECS], copied(spec), copied(list(pieces))))
        ((_, found),) = self._crew.results()
        if isinstance(found, Broken):
            raise BugError(found.kind, found.text, found.traceback)
        assert found.pid != os.getpid()
        for one in found.done:
            self.n_pieces += 1
            yield copied(one)
        if found.error:
            raise found.error


@contextlib.contextmanager
def second_process() -> Iterator[SecondProcess]:
    """Yield a process that starts with its first piece and ends with the block."""
    with Crew(do, 1, is_deaf=True) as crew:
        yield SecondProcess(crew)


def do(work: Work) -> Found:
    """Do pieces, one after the other, until one fails. Runs in the second process."""
    done: list[Done] = []
    try:
        with known(*work.toys), work.spec.make(1) as (worker,):
            for piece in work.pieces:
                done.append(worker(piece))  # noqa: PERF401 - what is done before an error counts
    except LoraMergeError as exc:
        return Found(os.getpid(), done, exc)
    return Found(os.getpid(), done, None)


def copied(value: Any) -> Any:
    """Return what comes out of a pickle of a value; it must be equal."""
    there = pickle.loads(pickle.dumps(value))
    assert there == value
    return there

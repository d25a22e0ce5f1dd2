"""The signature of every executor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from lora_merge.core.work import Result, Work, WorkerSpec


class Executor(Protocol):
    """A way to run pieces of work.

    Args:
        spec: makes the workers. Each thread, and each process, has one of its own.
        pieces: all of the work; it is begun in this order.
        n_workers: how many may be at it.
    """

    def __call__(
        self, spec: WorkerSpec[Work, Result], pieces: Sequence[Work], n_workers: int
    ) -> Generator[Result, None, None]:
        """Yield one result for each piece, in any order. The first error of a worker ends it."""

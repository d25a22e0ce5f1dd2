"""One step after the other, in the caller's thread: what correct means, and what debugs best."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lora_merge.executors.work import Result, Work


def run_serial(do: Callable[[Work], Result], work: Sequence[Work], n_workers: int = 1) -> Iterator[Result]:
    """Yield the result of each piece of work, in order; ``n_workers`` is ignored."""
    del n_workers
    for piece in work:
        yield do(piece)

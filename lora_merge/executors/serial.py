"""Runs one piece after the other in the caller's thread. Other executors are compared with it, and it is easiest to debug."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from lora_merge.core.work import Result, Work, WorkerSpec


def run_serial(
    spec: WorkerSpec[Work, Result], pieces: Sequence[Work], n_workers: int = 1
) -> Generator[Result, None, None]:
    """Yield the result of each piece, in order. ``n_workers`` is ignored: there is one."""
    del n_workers
    if not pieces:
        return
    with spec.make(1) as (work,):
        for piece in pieces:
            yield work(piece)

"""Worker threads. Reads, writes and tensor arithmetic release the interpreter's lock, so threads run in parallel."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from lora_merge.core.work import Result, Work, WorkerSpec


def run_threads(
    spec: WorkerSpec[Work, Result],
    pieces: Sequence[Work],
    n_workers: int,
    begin: Callable[[], None] | None = None,
) -> Generator[Result, None, None]:
    """Yield the result of each piece, in the order in which they finish.

    On an error, or when the caller stops listening, pieces that have not begun are dropped.

    Args:
        begin: called once in every thread, before its first piece.
    """
    from concurrent.futures import ThreadPoolExecutor, as_completed

    if not pieces:
        return
    with spec.make(min(n_workers, len(pieces))) as workers:
        free, mine = list(workers), threading.local()

        def enter() -> None:
            mine.worker = free.pop()  # one call into C: no two threads get the same
            if begin is not None:
                begin()

        def work(piece: Work) -> Result:
            result: Result = mine.worker(piece)
            return result

        pool = ThreadPoolExecutor(len(free), thread_name_prefix="merge", initializer=enter)
        try:
            futures = [pool.submit(work, piece) for piece in pieces]
            for future in as_completed(futures):
                yield future.result()
        finally:
            # Pieces under way are waited for: they use the workers, whose context ends next.
            pool.shutdown(wait=True, cancel_futures=True)

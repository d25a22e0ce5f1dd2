"""Worker threads: reads, writes and tensor arithmetic all release the interpreter's lock."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lora_merge.executors.work import Result, Work


def run_threads(
    do: Callable[[Work], Result],
    work: Sequence[Work],
    n_workers: int,
    begin: Callable[[], None] | None = None,
) -> Iterator[Result]:
    """Yield the result of each piece of work as it is done.

    Large pieces go first, so that no worker is left alone with one at the end. On an error, or when the
    caller stops listening, work that has not begun never does.

    Args:
        begin: called once in every thread, before its first piece of work.
    """
    from concurrent.futures import ThreadPoolExecutor, as_completed

    largest_first = sorted(work, key=lambda piece: piece.nbytes, reverse=True)
    pool = ThreadPoolExecutor(n_workers, thread_name_prefix="merge", initializer=begin)
    try:
        futures = [pool.submit(do, piece) for piece in largest_first]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

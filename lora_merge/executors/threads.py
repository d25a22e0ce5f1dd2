"""Worker threads: reads, writes and tensor arithmetic all release the interpreter's lock."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lora_merge.core.plan import Step
    from lora_merge.core.tensor import TensorRecord


def run_threads(
    do: Callable[[Step], TensorRecord], steps: Sequence[Step], n_workers: int
) -> Iterator[TensorRecord]:
    """Yield the record of each step as it is done.

    Large steps go first, so that no worker is left alone with one at the end. On an error, or when the
    caller stops listening, steps that have not begun never do.
    """
    from concurrent.futures import ThreadPoolExecutor, as_completed

    largest_first = sorted(steps, key=lambda step: step.nbytes, reverse=True)
    pool = ThreadPoolExecutor(n_workers, thread_name_prefix="merge")
    try:
        futures = [pool.submit(do, step) for step in largest_first]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

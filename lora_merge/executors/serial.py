"""One step after the other, in the caller's thread: what correct means, and what debugs best."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lora_merge.core.plan import Step
    from lora_merge.core.tensor import TensorRecord


def run_serial(
    do: Callable[[Step], TensorRecord], steps: Sequence[Step], n_workers: int = 1
) -> Iterator[TensorRecord]:
    """Yield the record of each step, in order; ``n_workers`` is ignored."""
    del n_workers
    for step in steps:
        yield do(step)

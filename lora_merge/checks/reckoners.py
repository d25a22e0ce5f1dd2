"""Threads that recompute: how many, and with how many of torch's own."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lora_merge.executors.crew import Crew
from lora_merge.runtime.torch_threads import one_torch_thread

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST = 8
"""Each needs memory for the rows that it recomputes, whatever the merge's own workers need."""


@contextlib.contextmanager
def reckoners(n_threads: int, *, has_torch: bool = True) -> Iterator[Crew]:
    """Yield a crew for arithmetic, whose threads have one core each. So has torch meanwhile, in this thread too.

    Args:
        n_threads: how many may look at a time.
        has_torch: False where torch is not needed, unless something is wrong: it is not loaded for this.
    """
    begin = _begin if has_torch else None
    with one_torch_thread(has_torch=has_torch), Crew(min(n_threads, _MOST), begin) as crew:
        yield crew


def _begin() -> None:
    import torch

    torch.get_num_threads()  # the process's number holds in this thread from now on: MKL has another until then

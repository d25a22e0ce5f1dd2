"""Threads that recompute: how many, and with how many of torch's own."""

from __future__ import annotations

from lora_merge.executors.crew import Crew

_MOST = 8
"""Each needs memory for the rows that it recomputes, whatever the merge's own workers need."""


def reckoners(n_threads: int) -> Crew:
    """Return a crew for arithmetic with torch, whose threads have one core each. Torch has one thread in its process already."""
    return Crew(min(n_threads, _MOST), _begin)


def _begin() -> None:
    import torch

    torch.get_num_threads()  # the process's number holds in this thread from now on: MKL has another until then

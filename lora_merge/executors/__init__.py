"""Executors: ways to run work. They carry steps out and records back, and know neither.

Serial is the definition of correct; what any other CPU executor writes is byte-identical to it. Results come in any
order, one for each piece of work. The first error ends the run.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from lora_merge.executors.cuda import run_cuda
from lora_merge.executors.serial import run_serial
from lora_merge.executors.threads import run_threads
from lora_merge.executors.work import Executor

if TYPE_CHECKING:
    from collections.abc import Mapping

EXECUTORS: Mapping[str, Executor] = {"serial": run_serial, "threads": run_threads, "cuda": run_cuda}

__all__ = ["EXECUTORS", "Executor", "pick"]


def pick(n_workers: int, device: str = "cpu") -> Executor:
    """Return the executor for so many workers on a torch device."""
    if device != "cpu":
        return partial(run_cuda, device=device)
    return EXECUTORS["serial" if n_workers == 1 else "threads"]

"""Executors: ways to run steps. They carry steps out and records back, and know neither.

Serial is the definition of correct; what any other writes is byte-identical to it. Records come in any
order, one per step. The first error ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from lora_merge.core.plan import Step
from lora_merge.core.tensor import TensorRecord
from lora_merge.executors.serial import run_serial
from lora_merge.executors.threads import run_threads

Do = Callable[[Step], TensorRecord]
Executor = Callable[[Do, Sequence[Step], int], Iterable[TensorRecord]]

EXECUTORS: dict[str, Executor] = {"serial": run_serial, "threads": run_threads}

__all__ = ["EXECUTORS", "Do", "Executor", "pick"]


def pick(n_workers: int) -> Executor:
    """Return the executor for so many workers."""
    return EXECUTORS["serial" if n_workers == 1 else "threads"]

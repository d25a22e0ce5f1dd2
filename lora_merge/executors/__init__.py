"""Executors: ways to run pieces of work. They know neither what the work is nor what its results mean.

Serial is the definition of correct; what any other CPU executor writes is byte-identical to it. Results come in any
order, one for each piece. The first error ends the run.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

from lora_merge.executors.cuda import run_cuda
from lora_merge.executors.paced import run_paced
from lora_merge.executors.processes import run_processes
from lora_merge.executors.serial import run_serial
from lora_merge.executors.threads import run_threads
from lora_merge.executors.work import Executor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.executors.pace import Pace
    from lora_merge.executors.ray.demand import Demand

EXECUTORS: Mapping[str, Executor] = {
    "serial": run_serial,
    "threads": run_threads,
    "processes": run_processes,
    "cuda": run_cuda,
}

IMPORTS: Mapping[str, tuple[str, ...]] = {
    "processes": (
        "multiprocessing.connection",
        "multiprocessing.popen_spawn_posix",
        "multiprocessing.resource_tracker",
    )
}
"""Executor → modules that it alone uses, and imports when it begins."""

RAY = "ray"
"""The executor whose workers are tasks on a Ray cluster. It is not in the table, since it needs a `Demand` too."""

__all__ = ["EXECUTORS", "IMPORTS", "RAY", "Executor", "choices", "connections", "pick", "stay_connected"]


def choices() -> tuple[str, ...]:
    """Return the names that a user may ask for. ``cuda`` is not one: the device decides on it."""
    return ("auto", *(name for name in EXECUTORS if name != "cuda"), RAY)


def connections() -> contextlib.AbstractContextManager[None]:
    """Keep the connection to a cluster that is made inside, until the block ends."""
    from lora_merge.executors.ray.cluster import held

    return held()


def stay_connected() -> None:
    """Keep such a connection for as long as this process lasts."""
    from lora_merge.executors.ray.cluster import stay

    stay()


def pick(
    n_workers: int,
    device: str = "cpu",
    name: str = "auto",
    demand: Demand | None = None,
    pace: Pace | None = None,
) -> Executor:
    """Return the executor for a number of workers on a torch device.

    Args:
        name: a key of `EXECUTORS`; ``auto``: threads, or no other thread than the caller's for one worker. A GPU has a
            separate executor, whatever the name; but for ``ray``, whose tasks find one on their node.
        demand: what a task of ``ray`` needs.
        pace: of threads: decides while they run how many do; None for all of them.
    """
    if name == RAY:
        from lora_merge.executors.ray.driving import run_ray

        assert demand is not None
        return partial(run_ray, demand=demand)
    if device != "cpu":
        return partial(run_cuda, device=device)
    # Never processes: each may have to load torch for itself, which takes seconds and some 260 MB.
    if name == "auto":
        name = "serial" if n_workers == 1 else "threads"
    if name == "threads" and pace is not None:
        return partial(run_paced, pace=pace)
    return EXECUTORS[name]

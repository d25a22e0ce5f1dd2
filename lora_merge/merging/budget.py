"""How many workers, and how large their tiles: what cores and memory allow for a plan. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import nlargest
from typing import TYPE_CHECKING

from lora_merge.core.view import TILE_ELEMENTS
from lora_merge.merging.estimate import occupied_workers
from lora_merge.merging.peak import RUNTIME_BYTES, peak_bytes, runtime_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.plan import MergePlan

MOST_WORKERS = 8
"""Unless more are asked for, or their number is measured: workers wait for each other to write one file, and a disk has its
limits."""

# On 16 cores, 16 workers merged a LoRA more slowly than 8, and 8 hardly faster than 4 (docs/performance.md).
FIRST_WORKERS = 4
"""How many begin where more are tried while the merge runs; more where the plan's arithmetic occupies more."""

CUDA_TILE_ELEMENTS = 1 << 22
"""Elements of a row tile on a GPU: enough to outweigh the fixed cost of its kernels and copies."""

_SMALLEST_SHARE = 8
"""Tiles are halved down to this part of their best size before a worker is given up."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The number of workers, the size of their tiles, and the memory that they take."""

    n_workers: int
    tile_elements: int
    """Elements of a row tile, about."""

    peak_bytes: int
    """Estimated resident memory of the whole process."""

    n_first: int = 0
    """How many begin, where the others are tried while the merge runs (`lora_merge.executors.pace`); 0: all of them."""

    is_asked: bool = False
    """True where the number of workers is the one that was asked for."""

    runtime_bytes: int = RUNTIME_BYTES
    """The part of `peak_bytes` that the process needs without any merge."""


def peak_together(budgets: Sequence[Budget]) -> int:
    """Return the estimated resident memory of several merges in one pass over their base, in bytes.

    The memory that the process needs without any merge counts once. What each merge has under way, mostly its factors, adds up.
    """
    return max(budget.runtime_bytes for budget in budgets) + sum(
        budget.peak_bytes - budget.runtime_bytes for budget in budgets
    )


def allot(
    plan: MergePlan,
    n_workers: int | None,
    n_cores: int,
    limit_bytes: int | None,
    *,
    on_gpu: bool = False,
    in_processes: bool = False,
    whole_files: Sequence[int] = (),
) -> Budget:
    """Return the budget with the most workers that fit into memory, and then the largest tiles that fit.

    Where nothing fits it is one worker with the smallest tiles, whose `Budget.peak_bytes` is above the limit.

    Args:
        plan: what is to be done.
        n_workers: as asked for. By default as many as there are cores, and threads on the CPU begin with a few of them; in
            processes, on a GPU and for whole files up to `MOST_WORKERS`.
        n_cores: that may be used.
        limit_bytes: of resident memory; None: no limit.
        on_gpu: True when a GPU does the arithmetic.
        in_processes: True when each worker has a process, with torch in it; the estimate is of all of them.
        whole_files: where a worker makes one file at a time: the bytes that each file has under way.
    """
    runtime = runtime_bytes(plan, on_gpu=on_gpu)
    best = CUDA_TILE_ELEMENTS if on_gpu else TILE_ELEMENTS
    is_paced = not (n_workers or in_processes or on_gpu or whole_files)
    n = n_workers or max(1, n_cores if is_paced else min(n_cores, MOST_WORKERS))
    n = min(n, len(whole_files)) if whole_files else n
    first = max(FIRST_WORKERS, occupied_workers(plan)) if is_paced and n > FIRST_WORKERS else n
    # (8).bit_length() is 4: the best size, a half, a quarter and an eighth of it.
    sizes = [best >> halvings for halvings in range(_SMALLEST_SHARE.bit_length())]
    while True:
        # Smaller tiles are no price for workers that may turn out to be too many.
        for size in sizes[: 1 if is_paced and n > MOST_WORKERS else None]:
            # Each process loads what it needs for itself; `peak_bytes` counts that once, for the driver.
            peak = peak_bytes(plan, n, size, runtime) + in_processes * n * runtime
            peak += sum(nlargest(n, whole_files))
            budget = Budget(n, size, peak, first if first < n else 0, n == n_workers, runtime)
            if limit_bytes is None or budget.peak_bytes <= limit_bytes:
                return budget
        # The smallest estimate that there is. The caller compares it with the limit and says so to the user.
        if n == 1:
            return budget
        n -= 1

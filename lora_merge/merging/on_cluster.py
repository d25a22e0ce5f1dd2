"""Merges whose workers are tasks on a Ray cluster: what each needs, and what other machines know of the inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.errors import RequestError
from lora_merge.merging.budget import Budget, allot
from lora_merge.requests.sizes import parse_size
from lora_merge.storage.replaceable import SUFFIX
from lora_merge.storage.sources import is_local
from lora_merge.storage.store_staging import RUN
from lora_merge.words import size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lora_merge.core.identity import Inputs
    from lora_merge.core.plan import MergePlan
    from lora_merge.executors.ray import Demand
    from lora_merge.requests.request import Request


def connected_cpus(request: Request) -> int:
    """Connect to the cluster of a request, and return the number of its CPUs.

    Raises:
        RequestError: there is none.
    """
    from lora_merge.executors.ray.cluster import connect  # few runs have a cluster

    return connect(request.ray_address)


def cluster_for_others(request: Request) -> str:
    """Return the address with which other processes of this machine reach the cluster of a request."""
    from lora_merge.executors.ray.cluster import address_for_children

    return address_for_children(request.ray_address)


def device_of_tasks(request: Request) -> str:
    """Return the torch device of tasks. This machine need not have one.

    Raises:
        RequestError: a certain GPU is asked for.
    """
    if request.device in {"auto", "cpu"}:
        return "cpu"
    if request.device in {"cuda", "cuda:0"}:
        return "cuda:0"
    sentence = f"is {request.device}, but Ray gives each task a GPU, which is its first one"
    raise RequestError("", 0, "device", sentence, hint="use --device cuda")


def task_budget(
    request: Request, plan: MergePlan, whole_files: Sequence[int], cpus: int | None, *, on_gpu: bool
) -> Budget:
    """Return the budget of tasks: its memory is that of one of them.

    Args:
        request: how many tasks and how much memory for each are wanted.
        plan: what is to be done.
        whole_files: as for `allot`.
        cpus: of the cluster; None where it is not known.
        on_gpu: True when a GPU does the arithmetic.

    Raises:
        RequestError: a task needs more memory than the request allows.
    """
    limit = None if request.memory_limit is None else parse_size(request.memory_limit)
    one = allot(plan, 1, 1, limit, on_gpu=on_gpu, whole_files=whole_files)
    if limit is not None and one.peak_bytes > limit:
        sentence = f"is {size_text(limit)}, but one task needs about {size_text(one.peak_bytes)}"
        raise RequestError("", 0, "memory_limit", sentence, hint="raise --memory-limit, or leave it out")
    n_files = max(1, len(whole_files))
    return replace(one, n_workers=max(1, min(request.workers or cpus or n_files, n_files)))


def demand_of(request: Request, budget: Budget, device: str, tell: Callable[[str], None]) -> Demand:
    """Return what each task asks the cluster for.

    Args:
        request: its limits.
        budget: of `task_budget`.
        device: a torch device.
        tell: hears why no task runs.
    """
    from lora_merge.executors.ray.demand import Demand

    return Demand(
        budget.peak_bytes, request.retries, device, is_limited=request.workers is not None, tell=tell
    )


def lock_of(out: str) -> str:
    """Return the path of the lock of an output on a filesystem; empty for one in a store, which every machine sees."""
    scheme, _, path = out.partition("://")
    return f"{path}{SUFFIX}/{RUN}" if scheme == "file" else ""


def seen_elsewhere(inputs: Inputs) -> Inputs:
    """Return inputs as other machines may know them: a copy of a file on a node has another inode than that of the driver."""
    files = {
        path: replace(file, is_local=False) if is_local(path) else file for path, file in inputs.files.items()
    }
    return replace(inputs, files=files)

"""Does a GPU pay for a merge? By the plan's arithmetic and measured costs, and why in a sentence."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.core.plan import Merge
from lora_merge.merging.estimate import arithmetic_ns, moved_bytes
from lora_merge.merging.worker import pick_device
from lora_merge.runtime import machine
from lora_merge.words import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.plan import MergePlan
    from lora_merge.core.report import Issue
    from lora_merge.requests.request import Request

# An H200 with 16 cores of a Xeon (docs/performance.md): 3 GB in 2.0 s, DoRA on 0.5 GB in 0.79 s.
_SETUP_SECONDS = 0.7
_MOVED = 4.6e9
"""Bytes a second that are read, sent to the GPU, fetched and written."""

# There too: 13.0 s against 7.6 s for TIES, and 10.9 s against 2.7 s for an SVD, with eight cores.
_GPU_IN_CORES = {"ties": 15.0, "svd": 43.0}
"""Combination → how many cores of a CPU the GPU is worth. What is not in the table was not measured: it counts as a gain of
nothing."""

_MARGIN = 0.8
"""The GPU has to take less than this part of the time, since its bits are not those of PEFT."""

_ROOM_BYTES = 2 << 30
"""Memory of a GPU for torch and the tiles of all workers."""

_MATRICES = 6
"""Matrices of the largest weight in float32 that a combination may have at a time."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What is known of a GPU."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """The torch device of a merge."""

    device: str
    why: str
    """In a sentence without a full stop."""


def chosen(request: Request, plan: MergePlan) -> Chosen:
    """Return the device of a merge. Torch is loaded only where a GPU might pay, or one is asked for.

    Raises:
        NoDeviceError: there are CUDA devices, but not the one that was asked for.
    """
    if request.device != "auto":
        device, why = pick_device(request.device)
        return Chosen(device, why or "it was asked for")
    n_cores = request.workers or machine.usable_cores()
    best = choose(plan, n_cores, Gpu("a GPU", 1 << 50))
    # Processes and tasks of a cluster each have a device of their own to set up.
    if best.device == "cpu" or request.executor != "auto":
        return Chosen("cpu", best.why if best.device == "cpu" else f"--executor is {request.executor}")
    return choose(plan, n_cores, _first_gpu())


def asked_or_chosen(request: Request, plan: MergePlan, asked: str, issues: Sequence[Issue]) -> Chosen:
    """Return the device that a plan is carried out on, and why.

    Args:
        request: ``auto``, or the device that is wanted.
        plan: what is to be done.
        asked: the device for a request that names one.
        issues: why it is not the one that was asked for.
    """
    if request.device == "auto":
        return chosen(request, plan)
    return Chosen(asked, issues[0].sentence if issues else "it was asked for")


def choose(plan: MergePlan, n_cores: int, gpu: Gpu | None) -> Chosen:
    """Return the device that takes less time for a plan; the CPU where it is close.

    Args:
        plan: what is to be done.
        n_cores: that may be used.
        gpu: None where there is none.
    """
    if gpu is None:
        return Chosen("cpu", "torch finds no CUDA device here")
    on_cpu, on_gpu = _seconds_on_cpu(plan, n_cores), _seconds_on_gpu(plan, n_cores)
    times = f"takes about {_text(on_cpu)} on {counted(n_cores, 'core')} and {_text(on_gpu)} on {gpu.name}"
    if on_gpu >= _MARGIN * on_cpu:
        return Chosen("cpu", f"the merge {times}")
    if gpu.memory_bytes < needed_bytes(plan):
        return Chosen("cpu", f"{gpu.name} has too little memory for the largest weight")
    return Chosen("cuda:0", f"the merge {times}")


def needed_bytes(plan: MergePlan) -> int:
    """Return the memory that a GPU should have for a plan, in bytes."""
    merges = [step.op for step in plan.steps if isinstance(step.op, Merge)]
    largest = max((math.prod(op.source.shape) for op in merges if op.combination is not None), default=0)
    return _ROOM_BYTES + _MATRICES * 4 * largest


def _seconds_on_cpu(plan: MergePlan, n_cores: int) -> float:
    return sum(arithmetic_ns(plan).values()) * 1e-9 / n_cores


def _seconds_on_gpu(plan: MergePlan, n_cores: int) -> float:
    ns = arithmetic_ns(plan)
    moving = moved_bytes(plan) / _MOVED
    unknown = sum(took for kind, took in ns.items() if kind and kind not in _GPU_IN_CORES) / n_cores
    known = sum(took / _GPU_IN_CORES[kind] for kind, took in ns.items() if kind in _GPU_IN_CORES)
    return _SETUP_SECONDS + moving + (unknown + known) * 1e-9


def _text(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def _first_gpu() -> Gpu | None:
    """Return the first CUDA device; None where there is none, or its driver fails. Torch is not loaded in vain."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"} or not _DRIVER.exists():
        return None
    import torch

    try:
        found = torch.cuda.get_device_properties(0)
    except Exception:  # noqa: BLE001 - a driver that does not fit raises many kinds of errors
        return None
    return Gpu(str(found.name), int(found.total_memory))


_DRIVER = Path("/proc/driver/nvidia/version")

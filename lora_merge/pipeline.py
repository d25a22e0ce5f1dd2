"""resolve → plan → merge → verify → publish, on one page. The composition root.

Only this module knows every stage; the stages do not know each other.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge import executors
from lora_merge._version import __version__
from lora_merge.core.provenance import Provenance
from lora_merge.core.report import NOT_VERIFIED, Report, Silence, Verdict, note
from lora_merge.core.request import Request
from lora_merge.core.shards import parse_size
from lora_merge.errors import PlanError, RequestError, VerifyError, WriteError
from lora_merge.io import staging
from lora_merge.merge import Merger, one_torch_thread, pick_device
from lora_merge.plan import make_plan
from lora_merge.resolve import base_of, own_side_files, resolve_adapter, resolve_base
from lora_merge.verify import verify
from lora_merge.writers import HfCheckpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

    from lora_merge.core.adapter import Adapter
    from lora_merge.core.plan import MergePlan
    from lora_merge.core.report import Observer
    from lora_merge.core.request import OutputDtype, VerifyLevel
    from lora_merge.core.tensor import TensorRecord


def merge(  # noqa: PLR0913 - the options of the command, each by its name
    *,
    adapter: str | PathLike[str],
    out: str | PathLike[str],
    base: str | PathLike[str] | None = None,
    dtype: OutputDtype | None = None,
    device: str = "auto",
    workers: int | None = None,
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
    verify: VerifyLevel = "sample",
    strict: bool = False,
    observer: Observer | None = None,
) -> Report:
    """Merge an adapter into a base and write a checkpoint that loads without LoRA support.

    Args:
        adapter: adapter directory.
        out: directory to create.
        base: base checkpoint directory; default: the adapter's ``base_model_name_or_path``.
        dtype: storage of the output; default: the base's, tensor by tensor.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        workers: worker threads; default: the number of usable cores.
        max_shard_size: for example ``"5GB"``; default: the base's own shards.
        overwrite: replace an existing output, once the new one is whole.
        verify: how much of the output to check before it gets its name.
        strict: treat warnings as errors.
        observer: hears of phases and bytes.

    Raises:
        LoraMergeError: with a sentence and a ``hint``; nothing stands under ``out`` then, but what stood
            there before.
    """
    request = Request(
        adapter=str(adapter),
        out=str(out),
        base=None if base is None else str(base),
        dtype=dtype,
        device=device,
        workers=workers,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        verify=verify,
        strict=strict,
    )
    return run(request, observer=observer)


def plan(
    *,
    adapter: str | PathLike[str],
    base: str | PathLike[str] | None = None,
    dtype: OutputDtype | None = None,
    max_shard_size: str | int | None = None,
) -> MergePlan:
    """Return what `merge` would read, compute and write; writes nothing.

    Raises:
        ResolveError: base or adapter cannot be found or read.
        PlanError: they do not fit.
    """
    request = Request(
        adapter=str(adapter),
        out="",
        base=None if base is None else str(base),
        dtype=dtype,
        max_shard_size=max_shard_size,
    )
    return _plan(request)[0]


def run(request: Request, *, dry_run: bool = False, observer: Observer | None = None) -> Report:
    """Carry out one request.

    Args:
        request: what to merge.
        dry_run: stop after planning; nothing is written.
        observer: hears of phases and bytes.

    Raises:
        LoraMergeError: see `lora_merge.errors`. Nothing stands under the output's name then, but what
            stood there before.
    """
    watch = observer or Silence()
    clock = _Clock()
    n_workers = request.workers or usable_cores()
    out = Path(request.out).expanduser().absolute()
    with clock("plan"):
        plan, adapter = _plan(request)
        _check_output(request, plan, out)
        summary = plan.summary(n_workers, _free_bytes(out))
        _check_strict(request, plan)
        if summary.disk_needed_bytes > summary.disk_free_bytes and not dry_run:
            raise _disk_full(out, summary.disk_needed_bytes, summary.disk_free_bytes)
    verdict = NOT_VERIFIED
    if not dry_run:
        with staging.staging(out) as staged:
            verdict = _write(request, plan, adapter, staged, n_workers, watch, clock)
            with clock("publish"):
                watch.phase("flushing", 0)
                staging.publish(staged, out)
    issues = plan.issues
    if summary.disk_needed_bytes > summary.disk_free_bytes:
        issues = (*issues, note("disk", str(out), "there is not enough free disk space for this merge"))
    return Report(plan.base, request.adapter, str(out), dry_run, summary, issues, verdict, clock.seconds)


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _plan(request: Request) -> tuple[MergePlan, Adapter]:
    """Resolve base and adapter, and plan their merge."""
    adapter = resolve_adapter(request.adapter)
    base = resolve_base(request.base or base_of(adapter))
    try:
        limit = None if request.max_shard_size is None else parse_size(request.max_shard_size)
    except ValueError as exc:
        raise RequestError("", 0, "max_shard_size", str(exc)) from exc
    plan = make_plan(
        base,
        adapter,
        dtype=request.dtype,
        max_shard_bytes=limit,
        own_side_files=frozenset(own_side_files(adapter, base)),
    )
    return plan, adapter


def _check_output(request: Request, plan: MergePlan, out: Path) -> None:
    """Check that the output may come into being, before anything does."""
    inputs = (Path(plan.base), *(Path(root) for root in plan.adapters))
    staging.check_replaceable(out.resolve(), overwrite=request.overwrite, inputs=inputs)


def _check_strict(request: Request, plan: MergePlan) -> None:
    warnings = [issue for issue in plan.issues if issue.severity == "warning"]
    if request.strict and warnings:
        raise PlanError(warnings)


def _write(
    request: Request,
    plan: MergePlan,
    adapter: Adapter,
    staged: Path,
    n_workers: int,
    watch: Observer,
    clock: _Clock,
) -> Verdict:
    """Fill the staging directory and return what its verification says."""
    with clock("load"):
        watch.phase("loading torch", 0)
        import torch  # noqa: F401 - seconds, and it belongs to this phase

        device = _device(request.device)
    writer = HfCheckpoint(staged)
    with clock("merge"):
        writer.reserve(plan)
        watch.phase("merging", sum(step.nbytes for step in plan.steps))
        records = _run_steps(Merger(writer, device), plan, n_workers, watch)
        writer.seal(plan, records, _provenance(request, plan, adapter))
    if request.verify == "none":
        return NOT_VERIFIED
    with clock("verify"):
        watch.phase("verifying", 0)
        verdict = verify(plan, staged, records, request.verify)
    if not verdict.ok:
        raise VerifyError(verdict)
    return verdict


def _run_steps(do: Merger, plan: MergePlan, n_workers: int, watch: Observer) -> list[TensorRecord]:
    records = []
    with one_torch_thread():
        for record in executors.pick(n_workers)(do, plan.steps, n_workers):
            records.append(record)
            watch.advance(record.nbytes)
            watch.done(record.name)
    return records


def _device(wanted: str) -> str:
    try:
        return pick_device(wanted)
    except ValueError as exc:
        raise RequestError("", 0, "device", str(exc), hint="use --device cpu") from exc


def _provenance(request: Request, plan: MergePlan, adapter: Adapter) -> Provenance:
    import platform

    import numpy as np
    import torch

    return Provenance(
        base=request.base or plan.base,
        adapter=adapter,
        adapter_path=request.adapter,
        out_name=Path(request.out).name,
        options={"dtype": request.dtype, "max_shard_size": request.max_shard_size, "device": request.device},
        versions={
            "lora-merge": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    )


def _free_bytes(out: Path) -> int:
    """Return the free bytes of the filesystem that the output will be on, stale staging counted free."""
    import shutil

    existing = next(path for path in (out, *out.parents) if path.exists())
    return shutil.disk_usage(existing).free + staging.stale_bytes(out)


def _disk_full(out: Path, needed: int, free: int) -> WriteError:
    sentence = f"{out}: needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on its disk"
    return WriteError(sentence, hint="free some, or choose another --out")


class _Clock:
    """Wall seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = round(time.perf_counter() - start, 4)

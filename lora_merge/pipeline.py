"""resolve → plan → merge → verify → publish, on one page. The composition root.

Only this module knows every stage; the stages do not know each other.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge import executors
from lora_merge._version import __version__
from lora_merge.core.adapter import Adapter
from lora_merge.core.plan import Copy, MergePlan, Step
from lora_merge.core.provenance import Provenance
from lora_merge.core.report import NOT_VERIFIED, Issue, Observer, Report, Silence, Verdict, warning
from lora_merge.core.request import Request, parse_fields
from lora_merge.core.shards import parse_size
from lora_merge.errors import PlanError, RequestError, VerifyError, WriteError
from lora_merge.io import staging
from lora_merge.merge import Merger, one_torch_thread, pick_device, torch_loading
from lora_merge.plan import make_plan
from lora_merge.resolve import base_of, own_side_files, resolve_adapter, resolve_base, unchanged_parameters
from lora_merge.verify import verify as check_output
from lora_merge.writers import HfCheckpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

    from lora_merge.core.report import Summary
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
    fields = {"dtype": dtype, "device": device, "workers": workers, "verify": verify}
    request = Request(
        adapter=str(adapter),
        out=str(out),
        base=None if base is None else str(base),
        overwrite=overwrite,
        strict=strict,
        **parse_fields({**fields, "max_shard_size": max_shard_size}),
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
        **parse_fields({"dtype": dtype, "max_shard_size": max_shard_size}),
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
    clock = _Clock()
    n_workers = request.workers or usable_cores()
    out = _absolute(request.out)
    with clock("plan"):
        plan, adapter = _plan(request)
        _check_strict(request, plan)
        inputs = (Path(plan.base), *(Path(root) for root in plan.adapters))
        staging.check_replaceable(out, overwrite=request.overwrite, inputs=inputs)
        summary = plan.summary(n_workers, _free_bytes(out))
        shortage = _shortage(out, summary)
    if shortage and not dry_run:
        raise WriteError(str(shortage))
    verdict = NOT_VERIFIED
    if not dry_run:
        work = _Work(request, plan, adapter, n_workers, observer or Silence(), clock)
        with staging.staging(out) as staged:
            verdict = work.write(staged)
            with clock("publish"):
                work.watch.phase("flushing", 0)
                staging.publish(staged, out)
    issues = (*plan.issues, shortage) if shortage else plan.issues
    return Report(plan.base, request.adapter, str(out), dry_run, summary, issues, verdict, clock.seconds)


@dataclass(frozen=True, slots=True)
class _Work:
    """The part of a run that writes."""

    request: Request
    plan: MergePlan
    adapter: Adapter
    n_workers: int
    watch: Observer
    clock: _Clock

    def write(self, staged: Path) -> Verdict:
        """Fill the staging directory and return what its verification says.

        Raises:
            VerifyError: it says no.
        """
        writer = HfCheckpoint(staged)
        records = self._fill(writer)
        writer.seal(self.plan, records, _provenance(self.request, self.plan, self.adapter))
        if self.request.verify == "none":
            return NOT_VERIFIED
        with self.clock("verify"):
            self.watch.phase("verifying", 0)
            verdict = check_output(self.plan, staged, records, self.request.verify)
        if not verdict.ok:
            raise VerifyError(verdict)
        return verdict

    def _fill(self, writer: HfCheckpoint) -> list[TensorRecord]:
        """Carry out every step and return the records: copies while torch loads, then the rest."""
        do = Merger(writer, _device(self.request.device))
        copies = [step for step in self.plan.steps if isinstance(step.op, Copy)]
        others = [step for step in self.plan.steps if not isinstance(step.op, Copy)]
        with self.clock("copy"), torch_loading():
            writer.reserve(self.plan)
            records = self._run("copying", do, copies)
        with self.clock("merge"), one_torch_thread():
            return records + self._run("merging", do, others)

    def _run(self, phase: str, do: Merger, steps: list[Step]) -> list[TensorRecord]:
        """Carry out steps and return their records."""
        self.watch.phase(phase, sum(step.nbytes for step in steps))
        records = []
        for record in executors.pick(self.n_workers)(do, steps, self.n_workers):
            records.append(record)
            self.watch.advance(record.nbytes)
            self.watch.done(record.name)
        return records


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _plan(request: Request) -> tuple[MergePlan, Adapter]:
    """Resolve base and adapter, and plan their merge."""
    adapter = resolve_adapter(request.adapter)
    base = resolve_base(request.base or base_of(adapter))
    limit = request.max_shard_size
    plan = make_plan(
        base,
        adapter,
        dtype=request.dtype,
        max_shard_bytes=None if limit is None else parse_size(limit),
        own_side_files=frozenset(own_side_files(adapter, base)),
        unchanged=frozenset(unchanged_parameters(adapter, base)),
    )
    return plan, adapter


def _absolute(out: str) -> Path:
    """Return the absolute path of an output; a link under its own name stays one."""
    path = Path(out).expanduser().absolute()
    return path.parent.resolve() / path.name


def _check_strict(request: Request, plan: MergePlan) -> None:
    warnings = [issue for issue in plan.issues if issue.severity == "warning"]
    if request.strict and warnings:
        raise PlanError(warnings)


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


def _shortage(out: Path, summary: Summary) -> Issue | None:
    """Return an issue when the disk is too small for the output."""
    needed, free = summary.disk_needed_bytes, summary.disk_free_bytes
    if needed <= free:
        return None
    sentence = f"needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on its disk"
    return warning("disk", str(out), sentence, "free some, or choose another --out")


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

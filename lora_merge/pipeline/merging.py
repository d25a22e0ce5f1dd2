"""plan → reserve → merge → seal → verify → publish, on one page."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge import executors
from lora_merge._version import __version__
from lora_merge.core.plan import Copy, MergePlan, Step
from lora_merge.core.provenance import Provenance
from lora_merge.core.report import (
    NOT_VERIFIED,
    Issue,
    Observer,
    Report,
    Silence,
    Verdict,
    survival_issues,
    warning,
)
from lora_merge.core.request import Request
from lora_merge.errors import RequestError, VerifyError, WriteError
from lora_merge.io import staging
from lora_merge.merge import Merger, one_torch_thread, pick_device, torch_loading
from lora_merge.pipeline.clock import Clock
from lora_merge.pipeline.planning import Planned, check_strict, plan_request
from lora_merge.verify import verify as check_output
from lora_merge.writers import HfCheckpoint

if TYPE_CHECKING:
    from lora_merge.core.report import Summary
    from lora_merge.core.tensor import Survival, TensorRecord


def run(request: Request, *, dry_run: bool = False, observer: Observer | None = None) -> Report:
    """Carry out one request.

    Args:
        request: what to merge.
        dry_run: stop after planning; nothing is written, and no output needs to be named.
        observer: hears of phases and bytes.

    Raises:
        LoraMergeError: see `lora_merge.errors`. Nothing stands under the output's name then, but what
            stood there before.
    """
    clock = Clock()
    n_workers = request.workers or usable_cores()
    out = _absolute(request.out)
    watch = observer or Silence()
    with clock("plan"):
        planned = plan_request(request, watch)
        plan = planned.plan
        check_strict(plan.issues, strict=request.strict)
        inputs = (Path(plan.base), *(Path(root) for root in plan.adapters))
        if request.out or not dry_run:
            staging.check_replaceable(out, overwrite=request.overwrite, inputs=inputs)
        summary = plan.summary(n_workers, _free_bytes(out))
        shortage = _shortage(out, summary)
    if shortage and not dry_run:
        raise WriteError(str(shortage))
    verdict = NOT_VERIFIED
    survival: dict[str, Survival] = {}
    drowned: tuple[Issue, ...] = ()
    if not dry_run:
        work = _Work(request, planned, n_workers, watch, clock)
        with staging.staging(out) as staged:
            verdict, survival = work.write(staged)
            drowned = survival_issues(survival)
            check_strict((*verdict.notes, *drowned), strict=request.strict)
            with clock("publish"):
                work.watch.phase("flushing", 0)
                staging.publish(staged, out)
    issues = (*plan.issues, *([shortage] if shortage else []), *verdict.notes, *drowned)
    return Report(
        plan.base,
        request.adapter,
        str(out) if request.out else "",
        dry_run,
        summary,
        issues,
        verdict,
        survival,
        clock.seconds,
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """The part of a run that writes."""

    request: Request
    planned: Planned
    n_workers: int
    watch: Observer
    clock: Clock

    @property
    def plan(self) -> MergePlan:
        """Return the plan."""
        return self.planned.plan

    def write(self, staged: Path) -> tuple[Verdict, dict[str, Survival]]:
        """Fill the staging directory; return what its verification says, and what became of each delta.

        While the disk takes the output in, the processor has nothing else to do than to verify it.

        Raises:
            VerifyError: it says no.
            WriteError: the disk does not take it.
        """
        writer = HfCheckpoint(staged)
        records = self._fill(writer)
        writer.seal(self.plan, records, _provenance(self.request, self.planned))
        survival = {record.name: record.survival for record in records if record.survival}
        if self.request.verify == "none":
            return NOT_VERIFIED, survival  # publishing flushes it
        with staging.flushing(staged):
            with self.clock("verify"), one_torch_thread():
                self.watch.phase("verifying", 0)
                verdict = check_output(self.plan, staged, records, self.request.verify)
            if not verdict.ok:
                raise VerifyError(verdict)
            self.watch.phase("flushing", 0)
        return verdict, survival

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


def _absolute(out: str) -> Path:
    """Return the absolute path of an output; a link under its own name stays one."""
    path = Path(out).expanduser().absolute()
    return path.parent.resolve() / path.name


def _device(wanted: str) -> str:
    try:
        return pick_device(wanted)
    except ValueError as exc:
        raise RequestError("", 0, "device", str(exc), hint="use --device cpu") from exc


def _provenance(request: Request, planned: Planned) -> Provenance:
    import platform

    import numpy as np
    import torch

    return Provenance(
        base=planned.base.text if request.base or planned.base.origin else planned.plan.base,
        adapters=tuple(use.adapter for use in planned.uses),
        adapter_paths=tuple(place.text for place in planned.adapters),
        base_origin=planned.base.origin,
        adapter_origins=tuple(place.origin for place in planned.adapters),
        out_name=Path(request.out).name,
        options=_options(request),
        versions={
            "lora-merge": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    )


def _options(request: Request) -> dict[str, object]:
    """Return the options that shape the output, for its manifest."""
    options: dict[str, object] = {
        "dtype": request.dtype,
        "max_shard_size": request.max_shard_size,
        "device": request.device,
        "base_is": request.base_is,
    }
    if request.expert_layout:
        options["expert_layout"] = list(request.expert_layout)
    if request.combine != "linear":
        options |= {"combine": request.combine, "density": request.density, "seed": request.seed}
    return options


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

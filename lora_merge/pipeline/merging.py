"""plan → (resume) → reserve → merge → seal → verify → publish, on one page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge import executors
from lora_merge._version import __version__
from lora_merge.core.budget import Budget, allot
from lora_merge.core.plan import Copy, MergePlan
from lora_merge.core.provenance import Provenance
from lora_merge.core.report import (
    NOT_VERIFIED,
    Issue,
    Observer,
    Report,
    Silence,
    Verdict,
    note,
    survival_issues,
    warning,
)
from lora_merge.core.request import Request
from lora_merge.core.shards import parse_size
from lora_merge.core.shortage import memory_for
from lora_merge.core.stretches import stretches
from lora_merge.errors import CheckpointError, RequestError, VerifyError, WriteError
from lora_merge.io import machine, staging
from lora_merge.io.journal import Journal
from lora_merge.merge import (
    Copier,
    Merger,
    NoDeviceError,
    Stopwatches,
    TorchLoading,
    one_torch_thread,
    pick_device,
    quick_turns,
)
from lora_merge.pipeline.clock import Clock
from lora_merge.pipeline.planning import Planned, check_strict, plan_request
from lora_merge.pipeline.resuming import Inputs, fingerprint, finished
from lora_merge.verify import verify as check_output
from lora_merge.writers import HfCheckpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lora_merge.core.report import Summary
    from lora_merge.core.tensor import Survival, TensorRecord
    from lora_merge.executors.work import Work
    from lora_merge.io.staging import Stage


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
    out = _absolute(request.out)
    watch = observer or Silence()
    with clock("plan"), memory_for("planning"):
        planned = plan_request(request, watch)
        plan = planned.plan
        check_strict(plan.issues, strict=request.strict)
        inputs = (Path(plan.base), *(Path(root) for root in plan.adapters))
        if request.out or not dry_run:
            staging.check_replaceable(out, overwrite=request.overwrite, inputs=inputs)
        device, *issues = _device(request.device)
        check_strict(issues, strict=request.strict)
        budget = _budget(request, plan, on_gpu=device != "cpu")
        summary = plan.summary(budget.n_workers, budget.peak_bytes, _free_bytes(out))
        shortage = _shortage(out, summary)
    if shortage and not dry_run:
        raise WriteError(str(shortage))
    verdict = NOT_VERIFIED
    survival: dict[str, Survival] = {}
    if not dry_run:
        work = _Work(request, planned, Inputs.of(plan), device, budget, watch, clock)
        with staging.staging(out, resume=request.resume) as stage, memory_for("writing the output"):
            verdict, survival = work.write(stage)
            found = (*work.notes, *verdict.notes, *survival_issues(survival))
            check_strict(found, strict=request.strict)
            with clock("publish"):
                watch.phase("publishing", 0)
                staging.publish(stage.output, out)
        issues += found
    return Report(
        plan.base,
        request.adapter,
        str(out) if request.out else "",
        dry_run,
        summary,
        (*plan.issues, *([shortage] if shortage else []), *issues),
        verdict,
        survival,
        clock.seconds,
        clock.busy_seconds,
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """The part of a run that writes."""

    request: Request
    planned: Planned
    inputs: Inputs
    device: str
    budget: Budget
    watch: Observer
    clock: Clock
    notes: list[Issue] = field(default_factory=list)
    """What is worth knowing about it."""

    @property
    def plan(self) -> MergePlan:
        """Return the plan."""
        return self.planned.plan

    def write(self, stage: Stage) -> tuple[Verdict, dict[str, Survival]]:
        """Fill the staging directory; return what its verification says, and what became of each delta.

        The disk takes the output in from the first byte on, and what is left of that while it is verified.

        Raises:
            VerifyError: it says no.
            WriteError: the disk does not take it.
            CheckpointError: an input cannot be read, or changed meanwhile.
        """
        writer = HfCheckpoint(stage.output)
        merge = fingerprint(self.plan, self.inputs, _options(self.request) | {"device": self.device})
        loading = TorchLoading()  # from here on this thread imports nothing
        records = self._resumed(stage, writer, merge) if self.request.resume else []
        with staging.Flushing(stage.output) as flushing, Journal(stage.journal, merge, records) as journal:
            done = {record.name for record in records}
            records += self._fill(writer, journal, flushing, loading, done)
            self.inputs.check()
            with self.clock("seal"):
                writer.seal(self.plan, records, _provenance(self.request, self.planned))
            verdict = self._verified(stage.output, records)
            with self.clock("flush"):
                self.watch.phase("flushing", 0)
                flushing.wait()
        return verdict, {record.name: record.survival for record in records if record.survival}

    def _resumed(self, stage: Stage, writer: HfCheckpoint, merge: str) -> list[TensorRecord]:
        """Return the records of what an interrupted run has written."""
        with self.clock("resume"), quick_turns():
            found = finished(self.plan, stage, writer, merge, self.budget.n_workers, self.watch)
        subject, n_tensors = str(_absolute(self.request.out)), len(self.plan.steps)
        if found:
            sentence = (
                f"{len(found)} of {n_tensors} tensors were there from an interrupted run, as it wrote them"
            )
            self.notes.append(note("resumed", subject, sentence))
        elif found is None and stage.journal.exists():
            sentence = (
                "an interrupted run was of another merge (other inputs, options or versions): begun anew"
            )
            self.notes.append(note("not-resumed", subject, sentence))
        return found or []

    def _verified(self, staged: Path, records: list[TensorRecord]) -> Verdict:
        """Return what the verification of the staged output says, if it says yes."""
        if self.request.verify == "none":
            return NOT_VERIFIED
        with self.clock("verify"), one_torch_thread():
            self.watch.phase("verifying", 0)
            verdict = check_output(self.plan, staged, records, self.request.verify)
        if not verdict.ok:
            raise VerifyError(verdict)
        return verdict

    def _fill(
        self,
        writer: HfCheckpoint,
        journal: Journal,
        flushing: staging.Flushing,
        loading: TorchLoading,
        done: set[str],
    ) -> list[TensorRecord]:
        """Carry out every step that is not done and return the records: copies while torch loads, then the rest.

        Copies are flushed meanwhile; what is merged is on its way to the disk by itself.

        Raises:
            ChangedError: an input is not what it was.
        """
        watches = Stopwatches()
        steps = [step for step in self.plan.steps if not done.issuperset(slot.name for slot in step.slots)]
        copies = [step for step in steps if isinstance(step.op, Copy)]
        others = [step for step in steps if not isinstance(step.op, Copy)]
        with self.clock("copy"), quick_turns():
            self._link(writer)
            writer.reserve(self.plan)
            records = self._run("copying", Copier(writer, watches), stretches(copies), "cpu", journal)
            flushing.rest()
        with self.clock("load"):
            loading.wait()
        with self.clock("merge"), one_torch_thread():
            merger = Merger(writer, self.device, self.budget.tile_elements, watches)
            records += self._run("merging", lambda step: [merger(step)], others, self.device, journal)
        self.clock.busy_seconds.update(watches.seconds())
        return records

    def _link(self, writer: HfCheckpoint) -> None:
        """Let weight files that nothing changes share their bytes with the base's, where that is wanted."""
        how = self.request.link or "reflink"
        if how == "copy":
            return
        refused = writer.link(self.plan, how)
        if refused and self.request.link:
            n_files, why = len(refused), next(iter(refused.values()))
            sentence = f"the disk makes no {how} links here ({why}), so {n_files} of its files were copied"
            self.notes.append(note("link", str(_absolute(self.request.out)), sentence))

    def _run(
        self,
        phase: str,
        do: Callable[[Work], list[TensorRecord]],
        work: Sequence[Work],
        device: str,
        journal: Journal,
    ) -> list[TensorRecord]:
        """Carry out some work and return the records it leaves, which the journal gets too."""
        self.watch.phase(phase, sum(piece.nbytes for piece in work))
        records = []
        n_workers = self.budget.n_workers
        try:
            for some in executors.pick(n_workers, device)(do, work, n_workers):
                journal.add(some)
                for record in some:
                    records.append(record)
                    self.watch.advance(record.nbytes)
                    self.watch.done(record.name)
        except CheckpointError:
            self.inputs.check()  # a file that changes breaks in many ways
            raise
        return records


def _device(wanted: str) -> tuple[str, *tuple[Issue, ...]]:
    """Return the torch device for what is asked for, and what there is to say about it."""
    try:
        device, why = pick_device(wanted)
    except NoDeviceError as exc:
        raise RequestError("", 0, "device", str(exc), hint="use --device cpu") from exc
    return (device, warning("no-gpu", "device", why)) if why else (device,)


def _budget(request: Request, plan: MergePlan, *, on_gpu: bool) -> Budget:
    """Return how many workers a merge has, and how large their tiles are.

    Raises:
        RequestError: one worker alone needs more memory than the request allows.
    """
    limit = machine.free_bytes() if request.memory_limit is None else parse_size(request.memory_limit)
    budget = allot(plan, request.workers, machine.usable_cores(), limit, on_gpu=on_gpu)
    if request.memory_limit is not None and limit is not None and budget.peak_bytes > limit:
        sentence = f"is {limit / 1e6:.0f} MB, and one worker needs about {budget.peak_bytes / 1e6:.0f} MB"
        raise RequestError("", 0, "memory_limit", sentence, hint="raise it, or leave it out")
    return budget


def _absolute(out: str) -> Path:
    """Return the absolute path of an output; a link under its own name stays one."""
    path = Path(out).expanduser().absolute()
    return path.parent.resolve() / path.name


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
        merged_before=planned.merged_before,
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

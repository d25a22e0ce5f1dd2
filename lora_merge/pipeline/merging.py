"""request → plan → the checkpoint: a run, or several of one base in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.core.budget import Budget, allot
from lora_merge.core.report import NOT_VERIFIED, Issue, Observer, Report, Silence, Summary, warning
from lora_merge.core.shards import parse_size
from lora_merge.core.shortage import memory_for
from lora_merge.errors import RequestError, WriteError
from lora_merge.io import machine, staging
from lora_merge.io.user_paths import nearest_existing, output_path
from lora_merge.merge import NoDeviceError, pick_device
from lora_merge.pipeline.clock import Clock
from lora_merge.pipeline.planning import Planned, check_strict, plan_request
from lora_merge.pipeline.writing import MARKS, Output, write
from lora_merge.plan import raise_errors
from lora_merge.plan.effect import effect_issues

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_merge.core.plan import MergePlan
    from lora_merge.requests.request import Request

_UNKNOWN_BYTES = 1 << 60
"""Free on a disk of which nobody knows."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that is planned, and found to be possible."""

    planned: Planned
    out: Path
    device: str
    budget: Budget
    summary: Summary
    issues: tuple[Issue, ...]
    shortage: Issue | None
    clock: Clock

    @property
    def request(self) -> Request:
        """Return the user's."""
        return self.planned.request

    def report(self, output: Output | None = None) -> Report:
        """Return what was done, or what would be."""
        request, plan = self.request, self.planned.plan
        shortage = [self.shortage] if self.shortage else []
        return Report(
            plan.base,
            request.adapter,
            str(self.out) if request.out else "",
            output is None,
            self.summary,
            (*plan.issues, *shortage, *self.issues, *(output.notes if output else ())),
            output.verdict if output else NOT_VERIFIED,
            output.survival if output else {},
            self.clock.seconds,
            self.clock.busy_seconds,
        )


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
    watch = observer or Silence()
    prepared = prepare(request, watch, dry_run=dry_run)
    if dry_run:
        return prepared.report()
    (done,) = carry_out([prepared], watch)
    if isinstance(done, Exception):
        raise done
    return done


def prepare(
    request: Request, watch: Observer, *, dry_run: bool = False, planned: Planned | None = None
) -> Prepared:
    """Plan a request, if it is not planned yet, and look at the machine that is to carry it out.

    Raises:
        LoraMergeError: it cannot be carried out.
    """
    clock = Clock()
    if not (request.out or dry_run):
        raise RequestError("", 0, "out", "is empty, expected a path (is a variable of the shell not set?)")
    out = output_path(request.out)
    with clock("plan"), memory_for("planning"):
        planned = planned or plan_request(request, watch)
        plan = planned.plan
        useless = effect_issues(plan, planned.uses)
        raise_errors(useless)
        check_strict((*plan.issues, *useless), strict=request.strict)
        if request.out or not dry_run:
            staging.check_replaceable(
                out, overwrite=request.overwrite, inputs=planned.read_files(), marks=MARKS
            )
        if not dry_run:
            staging.check_writable(out)
        device, *issues = _device(request.device)
        check_strict(issues, strict=request.strict)
        budget = _budget(request, plan, on_gpu=device != "cpu")
        summary = plan.summary(budget.n_workers, budget.peak_bytes, _free_bytes(out))
        shortage = _shortage(out, summary)
    if shortage and not dry_run:
        raise WriteError(str(shortage))
    return Prepared(planned, out, device, budget, summary, (*useless, *issues), shortage, clock)


def carry_out(group: Sequence[Prepared], watch: Observer) -> Iterator[Report | Exception]:
    """Make the outputs of some requests that have a base and a device in common, in one pass over the base.

    Yields:
        The report of each, or what it alone failed of, as soon as that is known.

    Raises:
        LoraMergeError: what all of them failed of.
    """
    outputs = [Output(one.planned, one.out, one.planned.inputs, one.device, one.clock) for one in group]
    smallest = min((one.budget for one in group), key=lambda budget: (budget.n_workers, budget.tile_elements))
    for one, output in zip(group, write(outputs, group[0].device, smallest, watch), strict=True):
        yield output.error or one.report(output)


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


def _free_bytes(out: Path) -> int:
    """Return the free bytes of the filesystem that the output will be on, stale staging counted free.

    A filesystem that does not say how large it is (some in FUSE do not) is taken for one with room: writing will tell.
    """
    import shutil

    try:
        usage = shutil.disk_usage(nearest_existing(out))
    except OSError:
        return _UNKNOWN_BYTES
    return usage.free + staging.stale_bytes(out) if usage.total else _UNKNOWN_BYTES


def _shortage(out: Path, summary: Summary) -> Issue | None:
    """Return an issue when the disk is too small for the output."""
    needed, free = summary.disk_needed_bytes, summary.disk_free_bytes
    if needed <= free:
        return None
    sentence = f"needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on its disk"
    return warning("disk", str(out), sentence, "free some, or choose another --out")

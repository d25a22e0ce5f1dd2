"""request → a merge that is planned and checked against this machine: disk, memory, device, executor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lora_merge.core.report import (
    NOT_VERIFIED,
    Issue,
    Observer,
    Report,
    Summary,
    Verdict,
    note,
    warning,
)
from lora_merge.core.tensor import Survival
from lora_merge.errors import RequestError, WriteError
from lora_merge.executors import RAY
from lora_merge.merging.budget import Budget, allot
from lora_merge.merging.by_file import file_pieces, under_way_bytes
from lora_merge.merging.device_choice import asked_or_chosen
from lora_merge.merging.estimate import estimate
from lora_merge.merging.headline import forewarn, merge_headline
from lora_merge.merging.made_already import is_made_already
from lora_merge.merging.on_cluster import connected_cpus, device_of_tasks, task_budget
from lora_merge.merging.output_place import place_of, wish_of
from lora_merge.merging.parts import Part, part_of
from lora_merge.merging.pushing import check_push, spooled
from lora_merge.merging.worker import NoDeviceError, pick_device
from lora_merge.planning import raise_errors
from lora_merge.planning.effect import effect_issues
from lora_merge.planning.run import Planned, check_strict, plan_request
from lora_merge.requests.sizes import parse_size
from lora_merge.runtime import machine
from lora_merge.runtime.clock import Clock
from lora_merge.runtime.shortage import translate_out_of_memory
from lora_merge.runtime.temporary import remove_left_behind
from lora_merge.storage.destination import Storage, Wish
from lora_merge.storage.hub.uploads.push import is_on_hub
from lora_merge.storage.sources import is_local
from lora_merge.words import size_text

if TYPE_CHECKING:
    from lora_merge.core.plan import MergePlan
    from lora_merge.requests.request import Request

NO_GPU = "no-gpu"
"""Code of the warning that observers hear before a merge begins (`headline.forewarn`)."""

COMPLETE = "is complete, and was made from the same base, adapters and options, so there is nothing to do"
"""What is said of an output that a run finds whole."""


@dataclass(frozen=True, slots=True)
class Made:
    """The result of making one output: verdict, timings, notes, or an error."""

    notes: tuple[Issue, ...] = ()
    """Notes and warnings for the user."""

    part: str = ""
    """Of an output that several make: which part this is, in words."""

    verdict: Verdict = NOT_VERIFIED
    survival: Mapping[str, Survival] = field(default_factory=dict)
    """By tensor name, for those that were sampled."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall seconds of each phase, planning included."""

    busy_seconds: Mapping[str, float] = field(default_factory=dict)
    store_copied_bytes: int = 0
    """Of the tensors that the store copied by itself."""

    pushed: str = ""
    """Where people see the output, if it was pushed."""

    workers: Mapping[str, int | str] = field(default_factory=dict)
    error: Exception | None = None
    """Why this output failed, while others of the same run did not. An error that is not a `LoraMergeError` is a bug.
    """


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that is planned and that this machine can carry out."""

    planned: Planned
    storage: Storage
    """The kind of storage that the output goes to."""

    wish: Wish
    """Where the output goes, and under which conditions."""

    device: str
    budget: Budget
    summary: Summary
    issues: tuple[Issue, ...]
    shortage: Issue | None
    seconds: Mapping[str, float]
    """Wall seconds of each phase so far: planning."""

    part: Part | None = None
    """Which files this process makes, where several make the output; None for all of them."""

    copies: bool = False
    """True where the store copies by itself what no delta touches."""

    is_made: bool = False
    """True where the output is complete, and made from the same: nothing is left to do."""

    device_why: str = "it was asked for"

    @property
    def out(self) -> str:
        """The absolute path or URL of the output."""
        return self.wish.out

    @property
    def takes_files(self) -> bool:
        """True where the output's files are written from the first byte to the last (`Storage.takes_files`)."""
        return self.storage.takes_files

    @property
    def headline(self) -> str:
        """What is merged into what, in one line."""
        return merge_headline(self.planned.checkpoint, self.planned.uses, self.planned.plan)

    @property
    def request(self) -> Request:
        """The request as the user made it."""
        return self.planned.request

    def report(self, made: Made | None = None) -> Report:
        """Return the report of the finished merge; without ``made``, the report of a dry run."""
        request, plan = self.request, self.planned.plan
        shortage = [self.shortage] if self.shortage else []
        done = made or Made(seconds=self.seconds)
        return Report(
            plan.base,
            request.adapter,
            self.out if request.out else "",
            made is None,
            self.summary,
            (*plan.issues, *shortage, *self.issues, *done.notes),
            done.verdict,
            done.survival,
            done.seconds,
            done.busy_seconds,
            self.headline,
            part=done.part,
            was_complete=self.is_made,
            store_copied_bytes=done.store_copied_bytes,
            pushed=done.pushed,
            workers={
                "most": self.budget.n_workers,
                **done.workers,
                "device": self.device,
                "device_why": self.device_why,
            },
        )


def prepare(
    request: Request, watch: Observer, *, dry_run: bool = False, planned: Planned | None = None
) -> Prepared:
    """Plan a request (unless it is planned), and check that this machine can carry it out.

    Raises:
        LoraMergeError: it cannot be carried out.
    """
    clock = Clock()
    if not (request.out or dry_run):
        raise RequestError("", 0, "out", "is empty, expected a path (an unset shell variable?)")
    part = _part(request)
    out, storage = place_of(request, dry_run=dry_run)
    # Before anything is fetched or read: who meant a GPU may not want to wait.
    asked, *issues = _device(request, watch, dry_run=dry_run)
    # A cluster that does not answer is said before anything is fetched. A dry run needs none.
    cpus = connected_cpus(request) if request.executor == RAY and not dry_run else None
    with clock("plan"), translate_out_of_memory("planning"):
        # A batch plans its jobs itself, to group them by base, and hands the plan in.
        planned = planned or plan_request(request, watch)
        plan = planned.plan
        useless = effect_issues(plan, planned.uses)
        raise_errors(useless)
        check_strict((*plan.issues, *useless), strict=request.strict)
        wish = wish_of(request, out, planned)
        # `merge --dry-run` and `plan` may have no output at all. With one, a dry run says what would stop the
        # real run.
        is_made = bool(request.out) and _is_made(planned, wish, storage, dry_run=dry_run)
        if (request.out or not dry_run) and not is_made:
            storage.check_replaceable(wish)
        check_push(request, planned)
        if not (dry_run or is_made or storage.takes_files):
            storage.check_writable(wish)
        choice = asked_or_chosen(request, plan, asked, issues)
        _check_executor(request, choice.device, out)
        _check_links(request, plan, storage)
        budget, wish = _allotted(request, plan, wish, storage, choice.device, cpus)
        summary = _summary(request, plan, budget, storage.free_bytes(out))
        shortage = _shortage(out, summary)
    # A dry run reports a full disk as an issue, and shows the rest of the plan too.
    if shortage and not dry_run and not is_made:
        raise WriteError(shortage.line, hint=shortage.hint)
    return Prepared(
        planned,
        storage,
        wish,
        choice.device,
        budget,
        summary,
        (*useless, *issues, *([note("complete", out, COMPLETE)] if is_made else [])),
        shortage,
        clock.seconds,
        part,
        _copies(request, storage, wish),
        is_made,
        choice.why,
    )


def _is_made(planned: Planned, wish: Wish, storage: Storage, *, dry_run: bool) -> bool:
    """Return True when a run that may continue another one finds the whole output."""
    found = is_made_already(planned, wish, storage)
    if found and not dry_run:
        # The run that completed it may have been killed before it removed its folders.
        remove_left_behind()
    return found


def _summary(request: Request, plan: MergePlan, budget: Budget, free_bytes: int) -> Summary:
    """Return the plan in numbers, with the estimate of its time."""
    summary = plan.summary(budget.n_workers, budget.peak_bytes, free_bytes)
    expected = estimate(plan, budget.n_workers, is_full=request.verify == "full")
    return replace(summary, read_bytes=expected.read_bytes, seconds=expected.seconds)


def _copies(request: Request, storage: Storage, wish: Wish) -> bool:
    """Return True when the store is to copy what no delta touches.

    Raises:
        RequestError: it was asked for, and the store cannot.
        LoraMergeError: the store cannot be asked.
    """
    if request.copies == "store":
        if not storage.can_copy(wish.out):
            sentence = f"is store, but {request.out} cannot copy by itself, or states no checksums"
            hint = 'leave out --copies; S3 can with the package boto3: pip install "lora-merge[s3]"'
            raise RequestError("", 0, "copies", sentence, hint=hint)
        return True
    # A store of another kind has nothing that this one could copy, so it is not asked.
    scheme = wish.out.partition("://")[0]
    is_near = any(text.startswith(f"{scheme}://") for text in wish.stored_inputs)
    return request.copies == "auto" and is_near and storage.can_copy(wish.out)


def _part(request: Request) -> Part | None:
    """Return the part of the output that is wanted; None for all of it.

    Raises:
        RequestError: it cannot be told, or the output is to be sealed as well.
    """
    if request.part is None:
        return None
    if request.seal:
        hint = "run all parts first, then --seal alone"
        raise RequestError("", 0, "seal", "cannot be combined with --part", hint=hint)
    return part_of(request.part)


def _device(request: Request, watch: Observer, *, dry_run: bool) -> tuple[str, *tuple[Issue, ...]]:
    """Return the torch device, then a warning where it is not the one that was asked for.

    Raises:
        RequestError: the machine has CUDA devices, but not this one.
        PlanError: there is a warning, and ``--strict`` is set.
    """
    if request.executor == RAY:
        return (device_of_tasks(request),)
    try:
        device, why = pick_device(request.device)
    except NoDeviceError as exc:
        raise RequestError("", 0, "device", str(exc), hint="use --device cpu") from exc
    if not why:
        return (device,)
    hint = "install a torch built for CUDA, or leave out --device; a GPU pays for DoRA and --combine only"
    issue = warning(NO_GPU, "device", why, hint)
    check_strict([issue], strict=request.strict)
    if not dry_run:
        forewarn(watch, issue)
    return device, issue


def _check_executor(request: Request, device: str, out: str) -> None:
    """Check that the executor can run workers of a device, and for an output.

    Raises:
        RequestError: it cannot.
    """
    if request.executor not in {"auto", "serial", "threads", RAY} and device != "cpu":
        sentence = f"is {request.executor}, but {device} works with threads only"
        raise RequestError("", 0, "executor", sentence, hint="leave out --executor, or use --device cpu")
    if request.executor not in {"auto", "serial", "threads"} and is_on_hub(out):
        sentence = f"is {request.executor}, but the files of {out} come together in one process"
        raise RequestError(
            "", 0, "executor", sentence, hint="leave out --executor, or write to a store first"
        )
    if request.executor in {"processes", RAY} and request.stream_base and request.token:
        sentence = f"is {request.executor}, whose workers are not given the token of --token, and each of them reads the base from the Hub"
        raise RequestError("", 0, "executor", sentence, hint="set HF_TOKEN instead of --token")


def _check_links(request: Request, plan: MergePlan, storage: Storage) -> None:
    """Check that files of the output can be links of the base's, where those are wanted.

    Raises:
        RequestError: they cannot.
    """
    if request.link in {None, "copy"}:
        return
    if storage.takes_files:
        sentence = f"is {request.link}, but {request.out} is in a store, which has no links"
        raise RequestError("", 0, "link", sentence, hint="leave out --link")
    if not is_local(plan.base):
        sentence = f"is {request.link}, but the base is read by its URL ({plan.base}), and only local files have links"
        raise RequestError("", 0, "link", sentence, hint="leave out --link, or pass the base's directory")


def _allotted(
    request: Request, plan: MergePlan, wish: Wish, storage: Storage, device: str, cpus: int | None
) -> tuple[Budget, Wish]:
    """Return the workers of a run, and what it wants of its place: on the Hub, also the bytes that wait on this disk.

    Args:
        request: how many workers and how much memory are wanted.
        plan: what is to be done.
        wish: as far as it is known.
        storage: of the output.
        device: a torch device.
        cpus: of the cluster; None where it is not known, or there is none.

    Raises:
        RequestError: one worker alone needs more memory, or one file more disk, than the request allows.
    """
    pieces = file_pieces(plan) if storage.takes_files else []
    whole_files, on_gpu = tuple(map(under_way_bytes, pieces)), device != "cpu"
    if request.executor == RAY:
        return task_budget(request, plan, whole_files, cpus, on_gpu=on_gpu), wish
    budget = _budget(request, plan, whole_files, on_gpu=on_gpu)
    if wish.push is None:
        return budget, wish
    sizes = [sum(file.nbytes for file in piece.files) for piece in pieces]
    n_workers, nbytes = spooled(wish.push, request, sizes, budget.n_workers)
    return replace(budget, n_workers=n_workers), replace(wish, push=replace(wish.push, spool_bytes=nbytes))


def _budget(request: Request, plan: MergePlan, whole_files: Sequence[int], *, on_gpu: bool) -> Budget:
    """Return the number of workers and the size of their tiles.

    Args:
        request: how many workers and how much memory are wanted.
        plan: what is to be done.
        whole_files: as for `allot`.
        on_gpu: True when a GPU does the arithmetic.

    Raises:
        RequestError: one worker alone needs more memory than the request allows.
    """
    # Without --memory-limit, the free memory guides the choice but refuses nothing: it is an estimate of a
    # moment.
    limit = machine.free_bytes() if request.memory_limit is None else parse_size(request.memory_limit)
    n_workers = 1 if request.executor == "serial" else request.workers
    in_processes = request.executor == "processes"
    budget = allot(
        plan,
        n_workers,
        machine.usable_cores(),
        limit,
        on_gpu=on_gpu,
        in_processes=in_processes,
        whole_files=whole_files,
    )
    if request.memory_limit is not None and limit is not None and budget.peak_bytes > limit:
        sentence = f"is {size_text(limit)}, but one worker needs about {size_text(budget.peak_bytes)}"
        raise RequestError("", 0, "memory_limit", sentence, hint="raise --memory-limit, or leave it out")
    return budget


def _shortage(out: str, summary: Summary) -> Issue | None:
    """Return a warning when the output needs more bytes than the disk has free; else None."""
    needed, free = summary.disk_needed_bytes, summary.disk_free_bytes
    if needed <= free:
        return None
    sentence = f"needs {size_text(needed)}, but its disk has only {size_text(free)} free"
    return warning("disk", out, sentence, "free disk space, or choose another --out")

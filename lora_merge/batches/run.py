"""Runs a batch: plans all jobs, groups them by base, runs each group. Running it again resumes."""

from __future__ import annotations

import contextlib
import signal
import time
import traceback
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge import executors
from lora_merge.batches.groups import fit_together, shortage
from lora_merge.batches.in_stores import place_of_output, standing_in_store
from lora_merge.batches.job import Job, job_elsewhere
from lora_merge.batches.reports import BatchObserver, BatchReport, JobReport, State
from lora_merge.batches.up_to_date import Standing, adapter_standing, standing
from lora_merge.batches.work import work_of
from lora_merge.conversion import job as conversion
from lora_merge.conversion import writing
from lora_merge.conversion.job import Conversion
from lora_merge.conversion.lora import ConvertReport
from lora_merge.conversion.run import plan_conversion
from lora_merge.core.report import Issue, Report, warning
from lora_merge.errors import BugError, LoraMergeError, WriteError
from lora_merge.executors.processes import Broken, Crew, be_idle
from lora_merge.merging.headline import announce
from lora_merge.merging.preparing import Prepared, prepare
from lora_merge.merging.run import carry_out
from lora_merge.planning.run import plan_request
from lora_merge.requests.request import ConvertRequest, Request
from lora_merge.runtime import machine
from lora_merge.runtime.clock import Clock
from lora_merge.runtime.interrupts import as_keyboard_interrupt, strike
from lora_merge.storage import staging

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType


@dataclass
class _Task:
    """A job, its state and its results while the batch runs."""

    job: Job
    state: State = "waiting"
    error: LoraMergeError | None = None
    planned: Prepared | Conversion | None = None
    report: Report | ConvertReport | None = None
    elsewhere: JobReport | None = None
    """The report from another process, if one carried it out."""

    notes: tuple[Issue, ...] = ()
    """Notes and warnings about an output that existed already."""

    seconds: float = 0.0

    def result(self) -> JobReport:
        """Return the job's report, as far as it is."""
        if self.elsewhere is not None:
            return self.elsewhere
        error, report = self.error, self.report
        if self.state == "planned" and isinstance(self.planned, Prepared):
            report = self.planned.report()
        told = error or report or (self.planned if self.state == "planned" else None)
        hints = (getattr(error, "hint", ""), *getattr(error, "__notes__", ())) if error else ()
        return JobReport(
            name=self.job.name,
            kind=self.job.kind,
            out=self.job.request.out,
            state=self.state,
            error=type(error).__name__ if error else "",
            message=error.without_hint if error else "",
            hint="; ".join(hint for hint in hints if hint),
            issues=(*self.notes, *getattr(told, "issues", ())),
            seconds=round(self.seconds, 3),
            traceback=getattr(error, "traceback", ""),
            report=report,
        )


def _merges_of(tasks: Sequence[_Task]) -> list[Prepared]:
    return [task.planned for task in tasks if isinstance(task.planned, Prepared)]


class Batch:
    """Carries out jobs. `report` can be called at any time, after an interrupt too.

    Args:
        jobs: in the order of their report.
        watch: hears of jobs, phases and bytes.
        keep_going: go on after failures. Otherwise no job is begun if one cannot be planned, and none after one
            failed.
        n_parallel: number of groups that run at the same time; if it is more than one, in separate processes.
        dry_run: plan only.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        watch: BatchObserver,
        *,
        keep_going: bool = False,
        n_parallel: int = 1,
        dry_run: bool = False,
    ) -> None:
        self._tasks = [_Task(job) for job in jobs]
        self._watch, self._keep_going, self._dry_run = watch, keep_going, dry_run
        self._n_parallel = n_parallel
        self._sent: list[list[_Task]] = []
        """Groups that other processes have been given, by their number."""

        self._began = time.monotonic()

    @as_keyboard_interrupt()
    def run(self) -> None:
        """Plan every job, then carry out those whose outputs are not up to date.

        Raises:
            KeyboardInterrupt: passed on, after unfinished jobs got the state ``not run``.
        """
        try:
            # One connection for all jobs that a cluster carries out.
            with executors.connections():
                for task in self._tasks:
                    self._plan(task)
                if not self._dry_run and self._goes_on():
                    self._announce()
                    self._carry_out_all(self._groups())
        finally:
            self._leave()

    def _announce(self) -> None:
        planned = {
            task.job.name: task.planned for task in self._tasks if task.state == "planned" and task.planned
        }
        n_kept = sum(task.state == "kept" for task in self._tasks)
        announce(self._watch, work_of(planned, len(self._tasks), n_kept))

    def _carry_out_all(self, groups: list[list[_Task]]) -> None:
        """Carry out groups one after the other, or several at the same time."""
        if self._n_parallel > 1 and len(groups) > 1:
            self._carry_out_elsewhere(groups)
            return
        for group in groups:
            if self._goes_on():
                self._carry_out(group)

    def report(self, file: str) -> BatchReport:
        """Return the state of every job so far."""
        seconds = round(time.monotonic() - self._began, 3)
        return BatchReport(file, tuple(task.result() for task in self._tasks), seconds, self._dry_run)

    def _goes_on(self) -> bool:
        return self._keep_going or not any(task.state == "failed" for task in self._tasks)

    def _set(self, task: _Task, state: State, sentence: str = "") -> None:
        task.state = state
        self._watch.job(task.job.name, state, sentence)

    def _fail(self, task: _Task, exc: Exception) -> None:
        """Mark a job as failed. An error that is not the user's is a bug, and fails this job alone."""
        error = exc if isinstance(exc, LoraMergeError) else _bug(exc)
        task.error = error
        self._set(task, "failed", error.without_hint)

    def _leave(self) -> None:
        """Mark jobs that were not begun, or not finished, as not run."""
        unfinished = {"running"} if self._dry_run else {"waiting", "planned", "running"}
        for task in self._tasks:
            if task.state in unfinished:
                self._set(task, "not run")

    def _plan(self, task: _Task) -> None:
        """Plan one job. Its state is then planned, kept or failed."""
        try:
            with as_keyboard_interrupt():
                is_kept = self._is_kept(task)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is this job's, and there are others
            self._fail(task, exc)
        else:
            self._set(task, "kept" if is_kept else "planned", "; ".join(issue.line for issue in task.notes))

    def _is_kept(self, task: _Task) -> bool:
        """Plan one job; return True if its output exists and is up to date.

        Raises:
            LoraMergeError: it cannot be carried out.
        """
        match task.job.request:
            case Request() as request:
                planned = plan_request(request, self._watch)
                storage, wish = place_of_output(request)
                out = wish.out
                # A dry run changes nothing, not even a time.
                found = standing_in_store(planned) or standing(planned, Path(out), remember=not self._dry_run)
                if found.is_current and not self._dry_run:
                    storage.clear_spent(wish)
                if not found.is_current:
                    _check_fault(found, out, request)
                    task.planned = prepare(request, self._watch, dry_run=self._dry_run, planned=planned)
            case ConvertRequest() as request:
                task.planned = job = plan_conversion(request, self._watch)
                out = str(job.out)
                found = adapter_standing(job)
                if not found.is_current:
                    _check_fault(found, out, request)
                    staging.check_replaceable(
                        job.out,
                        overwrite=request.overwrite,
                        inputs=job.read_files(),
                        home=job.home,
                        marks=conversion.MARKS,
                    )
                elif not self._dry_run:
                    staging.clear_spent(job.out, conversion.MARKS, resumes=False)
        task.notes = found.notes
        if found.fault:
            task.notes = (warning("made-anew", out, f"out of date, so it is made again: {found.fault}"),)
        return found.is_current

    def _groups(self) -> list[list[_Task]]:
        """Return the planned tasks in groups: merges of one base together, every conversion by itself."""
        # A base is read once for all merges of a group.
        groups: dict[object, list[list[_Task]]] = {}
        for task in self._tasks:
            if task.state != "planned":
                continue
            # A conversion is a group by itself.
            key: object = id(task)
            if isinstance(task.planned, Prepared):
                # One pass has one device and one executor.
                key = (task.planned.planned.plan.base, task.planned.device, task.planned.request.executor)
            of_base = groups.setdefault(key, [[]])
            # A new group begins when one pass has no room for another output.
            if of_base[-1] and not fit_together(_merges_of([*of_base[-1], task])):
                of_base.append([])
            of_base[-1].append(task)
        return [group for of_base in groups.values() for group in of_base]

    def _carry_out(self, group: list[_Task]) -> None:
        """Carry out the tasks of one group; an error fails the task that caused it."""
        began = time.monotonic()
        for task in group:
            self._set(task, "running")
        try:
            with as_keyboard_interrupt():
                for task, result in zip(group, self._results(group), strict=True):
                    task.seconds = time.monotonic() - began
                    if isinstance(result, Exception):
                        self._fail(task, result)
                    else:
                        task.report = result
                        self._set(task, "done")
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is one job's, and there are others
            if len(group) == 1:
                self._fail(group[0], exc)
                return
            # One of them is at fault. Running each alone shows which.
            for task in group:
                if task.state == "running":
                    self._carry_out([task])

    def _results(self, group: list[_Task]) -> Iterator[Report | ConvertReport | Exception]:
        """Yield the report of each task, or the error that it alone failed with."""
        merges = _merges_of(group)
        lack = None if self._keep_going else shortage(merges)
        if lack:
            yield from [lack] * len(merges)
        elif merges:
            yield from carry_out(merges, self._watch)
        for task in group:
            if isinstance(task.planned, Conversion):
                yield writing.carry_out(task.planned, self._watch, Clock())

    def _carry_out_elsewhere(self, groups: list[list[_Task]]) -> None:
        """Carry out groups in other processes, several at the same time."""
        n = min(self._n_parallel, len(groups))
        with _Crew(_elsewhere, n) as crew:
            try:
                # The processes share the cores.
                self._feed(crew, groups, max(1, machine.usable_cores() // n))
            except KeyboardInterrupt:
                # Each process keeps what is complete, and reports how far it came.
                crew.interrupt()
                while not crew.is_idle:
                    self._take_all(crew, is_interrupted=True)
                raise

    @as_keyboard_interrupt()
    def _feed(self, crew: _Crew, groups: list[list[_Task]], n_workers: int) -> None:
        """Give groups to processes as they become free, and take over their reports.

        Args:
            crew: the processes.
            groups: all of them.
            n_workers: threads for each process.
        """
        waiting = deque(range(len(groups)))
        self._sent = groups
        while True:
            while waiting and crew.has_room and self._goes_on():
                number = waiting.popleft()
                for task in groups[number]:
                    self._set(task, "running")
                try:
                    crew.begin((number, [job_elsewhere(task.job, n_workers) for task in groups[number]]))
                except OSError as exc:
                    for task in groups[number]:
                        self._fail(task, WriteError(f"cannot start a process for this job ({exc.strerror})"))
            if crew.is_idle:
                return
            self._take_all(crew)

    def _take_all(self, crew: _Crew, *, is_interrupted: bool = False) -> None:
        """Wait for a process and take over its reports. A process that ended fails its own group only."""
        for (number, *_), found in crew.results():
            group = self._sent[number]
            if isinstance(found, Broken):
                # A process that is interrupted before it began ends without a report. Its tasks have not
                # failed.
                for task in () if is_interrupted and not found.kind else group:
                    self._fail(task, _loss(found))
                continue
            for task, report in zip(group, found, strict=True):
                task.elsewhere = report
                self._set(task, report.state, report.message)


_Errand = tuple[int, "list[Job]"]
"""A group of jobs on its way to another process, with its number."""

_Crew = Crew[_Errand, "list[JobReport]"]


def _elsewhere(errand: _Errand) -> list[JobReport]:
    """Carry out a group of jobs in this process, which exists for that alone."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _interrupt)
    _, jobs = errand
    # Until this process ends: the next job finds the workers of this one.
    executors.stay_connected()
    # Whether the batch goes on after a failure is decided by the parent.
    batch = Batch(jobs, _Silent(), keep_going=True)
    with contextlib.suppress(KeyboardInterrupt):
        batch.run()
    be_idle()
    return list(batch.report("").jobs)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Turn SIGINT and SIGTERM into an interrupt, once: further signals must not disturb the clean-up."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    strike(signum, frame)


def _check_fault(found: Standing, out: str, request: Request | ConvertRequest) -> None:
    """Check that an output that is not up to date may be replaced. It may hold somebody's work.

    Raises:
        WriteError: ``--overwrite`` was not given.
    """
    if found.fault and not request.overwrite:
        raise WriteError(
            f"{out}: already exists and is not up to date: {found.fault}",
            hint="pass --overwrite to replace it (its present content is deleted), or choose another --out",
        )


def _bug(exc: Exception) -> BugError:
    return BugError(type(exc).__name__, str(exc), "".join(traceback.format_exception(exc)))


def _loss(found: Broken) -> LoraMergeError:
    """Return the error for jobs whose process ended, or failed to report."""
    if found.kind:
        return BugError(found.kind, found.text, found.traceback)
    hint = "run the command again to continue; a smaller --jobs needs less memory"
    return WriteError(
        f"its process ended unexpectedly ({found.text}), perhaps because memory ran out", hint=hint
    )


class _Silent:
    """An observer that ignores everything."""

    def phase(self, name: str, total_bytes: int) -> None: ...

    def advance(self, nbytes: int) -> None: ...

    def done(self, name: str) -> None: ...

    def job(self, name: str, state: State, sentence: str = "") -> None: ...

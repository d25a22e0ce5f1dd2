"""The page of a batch, with all its jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lora_merge.core.report import Report, error
from lora_merge.reporting.blocks import notices
from lora_merge.reporting.data import batch_data
from lora_merge.reporting.maps import (
    kept_chart,
    kinds_table,
    points_of_manifest,
    points_of_survival,
    size_chart,
)
from lora_merge.reporting.merges import inputs_of
from lora_merge.reporting.origin import near, origin_of
from lora_merge.reporting.page import (
    Command,
    Fact,
    Facts,
    Job,
    Mark,
    Page,
    Remark,
    State,
    Table,
    section,
    sections,
)
from lora_merge.words import counted, size_text

if TYPE_CHECKING:
    from lora_merge.batches.reports import BatchReport, JobReport
    from lora_merge.conversion.lora import ConvertReport
    from lora_merge.core.report import Issue
    from lora_merge.reporting.maps import Point
    from lora_merge.reporting.page import Block

_STATES: Mapping[str, tuple[State, str]] = {
    "done": ("good", "done"),
    "kept": ("good", "up to date"),
    "planned": ("plain", "planned"),
    "failed": ("bad", "failed"),
    "not run": ("warn", "not run"),
    "waiting": ("plain", "waiting"),
    "running": ("plain", "running"),
}
"""State of a job → how it is meant, and how it is called on a page."""

_MOST_CELLS = 3000
"""Most modules whose maps a page shows; further jobs get their facts alone."""

_NO_ROOM = "This page has no room for the maps of this job. lora-merge verify with --report shows them."

_MOST_JOBS = 300
"""Most jobs with separate details."""

_MOST_ROWS = 2000
"""Most jobs in the table."""


def batch_page(report: BatchReport, command: str) -> Page:
    """Return the page of a batch."""
    states = [(word, sum(job.state == state for job in report.jobs)) for state, (_, word) in _STATES.items()]
    return Page(
        kind="Plan of a batch" if report.dry_run else "Batch",
        headline=f"{counted(len(report.jobs), 'job')} of {report.file}",
        state="good" if report.ok else "bad",
        verdict=_verdict(report),
        figures=(*(Fact(word, str(n)) for word, n in states if n), Fact("time", f"{report.seconds:.1f} s")),
        sections=sections(
            section("jobs", "Jobs", _table(report), _left(report)),
            section("details", "Each job", *_jobs(report)),
            section("command", "Command", Command(command) if command else None),
        ),
        data=batch_data(report),
    )


def _verdict(report: BatchReport) -> str:
    if report.dry_run:
        n_failed = sum(job.state == "failed" for job in report.jobs)
        return (
            f"{counted(n_failed, 'job')} cannot be planned."
            if n_failed
            else "All jobs can be done. Nothing was written."
        )
    n_missing = sum(job.state not in {"done", "kept"} for job in report.jobs)
    if not n_missing:
        return "Every job has its output."
    return (
        f"{counted(n_missing, 'job')} of {len(report.jobs)} {'has' if n_missing == 1 else 'have'} no output."
    )


def _table(report: BatchReport) -> Table:
    has_names = any(job.name != job.out for job in report.jobs)
    rows = []
    for job in _listed(report):
        state, word = _STATES[job.state]
        result = job.message.partition("\n")[0] if job.message else summary_of(job)
        names = (job.name, job.out) if has_names else (job.out,)
        rows.append((Mark(word, state), *names, result, f"{job.seconds:.1f} s" if job.seconds else "–"))
    names = ("Job", "Output") if has_names else ("Output",)
    n = len(names)
    columns = ("State", *names, "Result", "Time")
    return Table(
        "All jobs", columns, tuple(rows), frozenset({n + 2}), frozenset(range(1, n + 1)), is_titled=True
    )


def _left(report: BatchReport) -> Remark | None:
    left = len(report.jobs) - len(_listed(report))
    return (
        Remark(f"This table has no room for {counted(left, 'other job')}; --json prints them.")
        if left
        else None
    )


def _listed(report: BatchReport) -> tuple[JobReport, ...]:
    """Return the jobs of the table, in their order: of very many, those that failed and the first others."""
    room = _MOST_ROWS - min(sum(job.state == "failed" for job in report.jobs), _MOST_ROWS)
    found: list[JobReport] = []
    for job in report.jobs:
        is_failed = job.state == "failed"
        if len(found) < _MOST_ROWS and (is_failed or room > 0):
            found.append(job)
            room -= not is_failed
    return tuple(found)


def summary_of(job: JobReport) -> str:
    """Return in a few words what a job did, or would do; of one that did nothing, its state."""
    match job.report:
        case None:
            return {"kept": "up to date, nothing to do", "not run": "not begun"}.get(job.state, "")
        case Report(summary=found):
            n_tensors = found.n_merged + found.n_replaced + found.n_cast + found.n_copied
            return f"{found.n_merged} of {n_tensors} tensors merged"
        case report:
            return f"{counted(len(report.modules), 'module')} written, {report.kept}"


def _jobs(report: BatchReport) -> list[Block]:
    """Return the details of each job; with maps as long as there is room."""
    found: list[Block] = []
    room = _MOST_CELLS
    listed = sorted(_listed(report), key=lambda job: job.state != "failed")[:_MOST_JOBS]
    chosen = {id(job) for job in listed}
    for n, job in enumerate(report.jobs):
        if id(job) not in chosen:
            continue
        state, word = _STATES[job.state]
        facts, points = _content(job)
        charts = _charts(points, f"job-{n}-") if len(points) <= room else [Remark(_NO_ROOM)]
        room -= len(points) if len(points) <= room else 0
        blocks = [notices((*_errors(job), *job.issues)), Facts(tuple(facts)), *charts]
        shown = tuple(one for one in blocks if getattr(one, "rows", True))
        found.append(Job(job.name, Mark(word, state), summary_of(job), shown))
    if left := len(report.jobs) - len(found):
        found.append(
            Remark(
                f"This page has no room for the details of {counted(left, 'other job')}; --json prints them."
            )
        )
    return found


def _errors(job: JobReport) -> list[Issue]:
    """Return the error of a job, if its issues do not say it."""
    is_said = any(issue.severity == "error" for issue in job.issues)
    return [] if is_said or not job.message else [error(job.error, "", job.message, job.hint)]


def _content(job: JobReport) -> tuple[list[Fact], list[Point]]:
    """Return what a job did, and the changes of the modules in its output."""
    if isinstance(job.report, Report):
        merge = job.report
        points = points_of_survival(merge.survival, merge.summary.module_ranks)
        return [Fact("merge", merge.headline), *inputs_of(merge)], points
    if job.report is not None:
        return _conversion(job.report), []
    out = [Fact("output", near(job.out), is_code=True)]
    if job.state != "kept" or job.kind != "merge":
        return out, []
    # An earlier run made it, and its manifest says how.
    origin = origin_of(job.out, "")
    adapters = [Fact("adapter", one.path, is_code=True) for one in origin.adapters]
    base = [Fact("base", origin.manifest.base.path, is_code=True)] if origin.manifest else []
    return [Fact("merge", origin.headline(origin.change)), *base, *adapters, *out], points_of_manifest(
        origin.table
    )


def _charts(points: Sequence[Point], prefix: str) -> list[Block]:
    found = (kept_chart(points, f"{prefix}kept"), size_chart(points, f"{prefix}size"), kinds_table(points))
    return [one for one in found if one is not None]


def _conversion(report: ConvertReport) -> list[Fact]:
    return [
        Fact("adapter", report.source, is_code=True),
        Fact("output", near(report.out), is_code=True),
        Fact("format", report.format),
        Fact("modules", str(len(report.modules))),
        Fact("done", ", ".join(report.transforms) or "rewritten"),
        Fact("kept", report.kept),
        Fact("size", size_text(report.nbytes)),
    ]

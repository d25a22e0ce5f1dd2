"""What a run looks like: progress and tables on stderr, data on stdout."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from lora_merge.cli.tables import done_text, print_batch, print_conversion, print_inspection
from lora_merge.cli.text import json_text, printable, size_text
from lora_merge.core.report import Report, Silence
from lora_merge.words import Alike, alike, cut, told

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.progress import Progress, TaskID
    from rich.table import Table

    from lora_merge.core.batch import BatchReport, JobReport
    from lora_merge.core.explanation import Match
    from lora_merge.core.inspection import Inspection
    from lora_merge.core.lora import ConvertReport, Loss
    from lora_merge.core.report import Issue, Observer, Proof

_LINE_SECONDS = 10.0  # between plain progress lines, where there is no terminal


class Console:
    """One command's voice.

    Args:
        as_json: print the result as data on stdout.
        quiet: print errors only.
        verbose: name every tensor, and time each phase.
        profile: print where each second went.
    """

    def __init__(self, *, as_json: bool, quiet: bool, verbose: bool, profile: bool = False) -> None:
        self._as_json, self._quiet, self._verbose, self._profile = as_json, quiet, verbose, profile

    @contextlib.contextmanager
    def watching(self) -> Iterator[Observer]:
        """Yield an observer: a progress bar on a terminal, plain lines elsewhere."""
        if self._quiet:
            yield Silence()
        elif sys.stderr.isatty():
            from rich.console import Console as RichConsole

            with _progress(RichConsole(stderr=True)) as progress:
                yield _Bar(progress, verbose=self._verbose)
        else:
            yield _Lines(verbose=self._verbose)

    def report(self, report: Report) -> None:
        """Print what a run did, or would do."""
        if not self._quiet:
            self._issues(report.issues)
        if self._as_json:
            click.echo(json_text({"ok": True, **asdict(report)}))
        elif report.dry_run:
            _print_plan(report, verbose=self._verbose)
        elif not self._quiet:
            click.echo(_done(report), err=True)
        if self._verbose and not self._quiet:
            spent = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in report.seconds.items())
            click.echo(f"time: {spent}", err=True)
        if self._profile:
            _print_profile(report)

    def proof(self, proof: Proof, *, failed: bool) -> None:
        """Print what verifying an output found: a line for each check, and a table of what differs."""
        if self._as_json:
            click.echo(json_text({"ok": not failed, **_proof_data(proof)}))
            return
        if self._quiet:
            for issue in proof.issues:
                if issue.severity == "error":
                    click.echo(f"error: {printable(str(issue))}", err=True)
            return
        _print_proof(proof, failed=failed, verbose=self._verbose)
        if self._verbose:
            spent = ", ".join(f"{check} {seconds:.2f} s" for check, seconds in proof.seconds.items())
            click.echo(f"time: {spent}", err=True)

    def inspection(self, found: Inspection, *, full: bool) -> None:
        """Print what an adapter is, and what is wrong with it."""
        if self._as_json:
            ok = not any(issue.severity == "error" for issue in found.issues)
            click.echo(json_text({"ok": ok, **_inspection_data(found)}))
        elif not self._quiet:
            print_inspection(found, full=full)
        self._issues(found.issues)

    def conversion(self, report: ConvertReport) -> None:
        """Print what a conversion or an extraction did."""
        self._issues(report.issues)
        if self._as_json:
            click.echo(json_text({"ok": True, **_conversion_data(report)}))
        elif not self._quiet:
            print_conversion(report, verbose=self._verbose)
            click.echo(done_text(report), err=True)

    def batch(self, report: BatchReport) -> None:
        """Print what became of a batch: a table of jobs, and what went wrong."""
        if self._as_json:
            jobs = [{**asdict(job), "report": _job_data(job)} for job in report.jobs]
            click.echo(json_text({"ok": report.ok, **asdict(report), "jobs": jobs}))
        if not self._quiet or not report.ok:
            print_batch(report, only_failed=self._quiet or self._as_json)

    def _issues(self, issues: Sequence[Issue]) -> None:
        """Print issues, those alike as one unless it is verbose; when it is quiet the errors only."""
        said = [issue for issue in issues if issue.severity == "error" or not self._quiet]
        say_issues(said, each=self._verbose)

    def matches(self, matches: tuple[Match, ...]) -> None:
        """Print how some modules were matched."""
        if self._as_json:
            click.echo(json_text({"ok": True, "matches": [asdict(match) for match in matches]}))
        else:
            click.echo("\n\n".join(printable(match.text()) for match in matches))


def _loss_data(loss: Loss | None) -> dict[str, float] | None:
    """Return a loss as data; None where nothing was lost."""
    return None if loss is None else {**asdict(loss), "relative": loss.relative, "energy": loss.energy}


def _conversion_data(report: ConvertReport) -> dict[str, Any]:
    """Return a conversion as data, with the loss of each module and of all."""
    data = asdict(report)
    losses = [_loss_data(one.loss) for one in report.modules]
    data["modules"] = [{**one, "loss": loss} for one, loss in zip(data["modules"], losses, strict=True)]
    return {**data, "loss": _loss_data(report.loss)}


def _job_data(job: JobReport) -> dict[str, Any] | None:
    """Return a job's own report as the data that its own command prints."""
    match job.report:
        case None:
            return None
        case Report() as report:
            return asdict(report)
        case report:
            return _conversion_data(report)


def _inspection_data(found: Inspection) -> dict[str, Any]:
    """Return an inspection as data, with each engine's verdict and each module's ratio."""
    data = asdict(found)
    data["engines"] = [{**asdict(one), "verdict": one.verdict} for one in found.engines]
    data["modules"] = [{**asdict(one), "relative": one.relative} for one in found.modules]
    return data


def say_issues(issues: Sequence[Issue], *, each: bool) -> None:
    """Print issues on stderr: each, or those alike as one."""
    errors = [issue for issue in issues if issue.severity == "error"]
    groups, n_left = ([Alike([issue]) for issue in errors], 0) if each else told(errors, len(errors))
    others = [issue for issue in issues if issue.severity != "error"]
    for group in (*([Alike([issue]) for issue in others] if each else alike(others)), *groups):
        click.echo(f"{group.first.severity}: {printable(str(group))}", err=True)
    if left := cut(len(groups), len(groups) + n_left, "other kinds", "-v and --json list them all"):
        click.echo(left, err=True)


def say_error(
    error: BaseException, sentence: str, code: int, *, as_json: bool, verbose: bool = False
) -> None:
    """Print an error: for people on stderr, with ``verbose`` every issue of it, and with ``as_json`` as data on stdout."""
    issues: tuple[Issue, ...] = getattr(error, "issues", ())
    if verbose and len(issues) > 1:
        say_issues(issues, each=True)
        sentence = sentence.splitlines()[0]
    click.echo(f"error: {printable(sentence)}", err=True)
    for hint in _hints(error):
        click.echo(f"hint: {printable(hint)}", err=True)
    if as_json:
        click.echo(error_json(error, sentence, code))


def _hints(error: BaseException) -> list[str]:
    """Return what an error says to do about it: its own hint, and what was noted on its way."""
    return [hint for hint in (getattr(error, "hint", ""), *getattr(error, "__notes__", ())) if hint]


def error_json(error: BaseException, sentence: str, code: int) -> str:
    """Return an error as JSON, with every issue that it carries."""
    issues: tuple[Issue, ...] = getattr(error, "issues", ())
    verdict = getattr(error, "verdict", None)
    data: dict[str, Any] = {
        "ok": False,
        "error": type(error).__name__,
        "exit_code": code,
        "message": sentence,
        "hint": "; ".join(_hints(error)),
        "issues": [asdict(issue) for issue in (verdict.issues if verdict else issues)],
    }
    return json_text(data)


def _done(report: Report) -> str:
    summary, seconds = report.summary, sum(report.seconds.values())
    total = summary.merged_bytes + summary.replaced_bytes + summary.cast_bytes + summary.copied_bytes
    verdict = report.verdict
    checked = (
        f"verified {verdict.n_tensors} tensors, {verdict.n_rows} rows recomputed"
        if verdict.level != "none"
        else "not verified"
    )
    merged = f"merged {summary.n_merged} tensors, copied {summary.n_copied}"
    merged += f", replaced {summary.n_replaced}" if summary.n_replaced else ""
    merged += f", cast {summary.n_cast}" if summary.n_cast else ""
    return f"{printable(report.out)}: {merged}, {size_text(total)} in {seconds:.1f} s; {checked}"


_LISTED = 30  # rows of a table of what differs; --json has them all


def _proof_data(proof: Proof) -> dict[str, Any]:
    """Return a proof as data, with what each check and comparison came to."""
    data = asdict(proof)
    data["findings"] = [{**asdict(finding), "state": finding.state} for finding in proof.findings]
    data["comparisons"] = [{**asdict(one), "ok": one.ok} for one in proof.comparisons]
    return {**data, "checked": proof.checked, "not_checked": proof.not_checked}


def _print_proof(proof: Proof, *, failed: bool, verbose: bool) -> None:
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    console = RichConsole()
    styles = {"passed": "green", "failed": "red", "not asked": "yellow"}
    table = Table("check", "", "of what", title=printable(proof.out))
    for finding in proof.findings:
        state = Text(finding.state, styles[finding.state])
        table.add_row(finding.check, state, Text(printable(finding.detail), overflow="fold"))
    console.print(table)
    wrong = [(finding.check, issue) for finding in proof.findings for issue in finding.issues]
    for _, issue in wrong:
        if issue.severity != "error":
            click.echo(f"{issue.severity}: {printable(str(issue))}", err=True)
    errors = [(check, issue) for check, issue in wrong if issue.severity == "error"]
    if errors:
        differs = Table("check", "what", "found", title="what differs")
        rows = [
            (check, group)
            for check in dict(errors)
            for group in alike(issue for where, issue in errors if where == check)
        ]
        for check, group in rows[:_LISTED]:
            sentence = f"{group.sentence} ({group.hint})" if group.hint else group.sentence
            differs.add_row(
                check, *(Text(printable(text), overflow="fold") for text in (group.subject, sentence))
            )
        console.print(differs)
        if left := cut(_LISTED, len(rows), way="--json lists them all"):
            click.echo(left)
    if proof.comparisons and (verbose or not proof.ok):
        console.print(_comparison_table(proof))
    click.echo(_conclusion(proof, failed=failed))


def _conclusion(proof: Proof, *, failed: bool) -> str:
    """Return what was checked and what was not, and what it comes to."""
    lines = [f"checked: {'; '.join(proof.checked)}"]
    if proof.not_checked:
        lines.append(f"not checked: {'; '.join(proof.not_checked)}")
    if failed:
        lines.append("verification failed")
    elif len(proof.checked) > 1:
        lines.append("verified: no check found a difference")
    else:
        lines.append("the structure is sound; the values of the weights were not checked")
    return "\n".join(lines)


def _comparison_table(proof: Proof) -> Table:
    """Return the table of forward passes."""
    from rich.table import Table
    from rich.text import Text

    columns = ("engine", "prompt", "max |Δ|", "tolerance", "KL", "top-1", "first diverging")
    table = Table(*columns, title="forward passes")
    for one in proof.comparisons:
        diverging = "none" if one.first_diverging is None else f"{one.first_diverging + 1} of {one.n_tokens}"
        table.add_row(
            one.engine,
            Text(printable(one.prompt), overflow="fold"),
            Text(f"{one.max_difference:.3g}", "" if one.ok else "red"),
            f"{one.tolerance:.3g}",
            "" if one.kl is None else f"{one.kl:.2g}",
            "" if one.top1 is None else f"{one.top1:.1%}",
            diverging if one.n_tokens else "",
        )
    return table


def _print_plan(report: Report, *, verbose: bool) -> None:
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    summary = report.summary
    table = Table(title="plan", show_header=False)
    rows = [
        ("base", report.base),
        ("adapter", ", ".join(report.adapters)),
        *([("output", report.out)] if report.out else []),
        ("tensors merged", f"{summary.n_merged} ({size_text(summary.merged_bytes)})"),
        ("tensors replaced", f"{summary.n_replaced} ({size_text(summary.replaced_bytes)})"),
        ("tensors copied", f"{summary.n_copied} ({size_text(summary.copied_bytes)})"),
        ("tensors cast", f"{summary.n_cast} ({size_text(summary.cast_bytes)})"),
        ("kind", _counts(summary.kinds)),
        ("rank", _counts(summary.ranks)),
        ("scale", _counts(summary.scales)),
        ("weight files", str(summary.n_shards)),
        ("side files", str(summary.n_side_files)),
        ("workers", str(summary.n_workers)),
        ("peak memory", f"about {size_text(summary.peak_bytes)}"),
        ("disk needed", size_text(summary.disk_needed_bytes)),
        ("disk free", size_text(summary.disk_free_bytes)),
    ]
    for name, value in rows:
        table.add_row(name, Text(printable(value), overflow="fold"))
    console = RichConsole()
    console.print(table)
    if verbose and summary.module_ranks:
        ranks = Table("parameter", "rank", title="ranks")
        for name, rank in summary.module_ranks.items():
            ranks.add_row(Text(printable(name), overflow="fold"), str(rank))
        console.print(ranks)


_PHASES = {
    "plan": "read headers, match the adapter, lay out the output",
    "resume": "check what an interrupted run has written",
    "copy": "move what no delta touches; torch loads meanwhile",
    "load": "wait until torch is there",
    "merge": "stream every other tensor through float32",
    "seal": "write what goes around the weights",
    "verify": "look at the output; the disk takes it in meanwhile",
    "flush": "wait until the disk has all of it",
    "publish": "give it its name",
}
_STAGES = {
    "copy": "move what no delta touches",
    "digest": "take digests of what is written",
    "prepare": "load factors",
    "read": "read tiles of the base",
    "decode": "widen them to float32",
    "change": "apply deltas",
    "encode": "round to the stored dtype, look for NaN",
    "wait": "wait for the GPU",
    "write": "write tiles",
}


def _print_profile(report: Report) -> None:
    """Print the wall time of each phase, and what the workers were busy with meanwhile."""
    from rich.console import Console as RichConsole
    from rich.table import Table

    console, n = RichConsole(stderr=True), report.summary.n_workers
    phases = Table("phase", "seconds", "", title="where each second went")
    for phase, seconds in report.seconds.items():
        phases.add_row(phase, f"{seconds:.2f}", _PHASES.get(phase, ""))
    phases.add_row("all", f"{sum(report.seconds.values()):.2f}", "", style="bold")
    console.print(phases)
    if report.busy_seconds:
        stages = Table("stage", "seconds", "", title=f"copy and merge: {n} worker{'s' * (n != 1)} together")
        for stage, what in _STAGES.items():
            if stage in report.busy_seconds:
                stages.add_row(stage, f"{report.busy_seconds[stage]:.2f}", what)
        stages.add_row("all", f"{sum(report.busy_seconds.values()):.2f}", "", style="bold")
        console.print(stages)


def _counts(counts: Any) -> str:
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} × {count}" for value, count in counts.items())


def _progress(console: Any) -> Progress:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)


class _Bar:
    """An observer that moves a progress bar."""

    def __init__(self, progress: Progress, *, verbose: bool) -> None:
        self._progress, self._verbose = progress, verbose
        self._task: TaskID | None = None

    def phase(self, name: str, total_bytes: int) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=total_bytes or None)

    def advance(self, nbytes: int) -> None:
        if self._task is not None:
            self._progress.advance(self._task, nbytes)

    def done(self, name: str) -> None:
        if self._verbose:
            self._progress.console.print(printable(name), markup=False, highlight=False)


class _Lines:
    """An observer that prints a line now and then, for logs."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose
        self._name, self._total, self._done = "", 0, 0
        self._began = self._spoke = time.monotonic()

    def phase(self, name: str, total_bytes: int) -> None:
        self._name, self._total, self._done = name, total_bytes, 0
        self._began = self._spoke = time.monotonic()
        click.echo(f"{name} …" if not total_bytes else f"{name} {size_text(total_bytes)} …", err=True)

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        now = time.monotonic()
        if now - self._spoke >= _LINE_SECONDS:
            self._spoke = now
            rate = self._done / (now - self._began)
            left = (self._total - self._done) / rate if rate else 0
            share = f"{size_text(self._done)} of {size_text(self._total)}"
            click.echo(f"{self._name}: {share}, {size_text(rate)}/s, {left:.0f} s left", err=True)

    def done(self, name: str) -> None:
        if self._verbose:
            click.echo(f"  {printable(name)}", err=True)

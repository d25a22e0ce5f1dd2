"""Adapters, conversions and batches as lines and tables."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from lora_merge.cli.issues import say_group
from lora_merge.cli.layout import RED, YELLOW, Cell, Column, Mark, facts, grid, shortened, styled, wrapped
from lora_merge.cli.voice import say, say_layout, say_lines, show_layout, width_of
from lora_merge.core.report import Report
from lora_merge.peft_rules.method_names import method_name
from lora_merge.redaction import fit
from lora_merge.words import alike, counted, cut, listing, printable, ranges, size_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lora_merge.batches.reports import BatchReport, JobReport, State
    from lora_merge.conversion.lora import ConvertReport, Written
    from lora_merge.inspection.facts import Inspection, ModuleFacts
    from lora_merge.serving.engine_report import EngineReport

_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.|$)")

_VERDICTS: Mapping[str, str] = {"no": RED}
"""Verdict of an engine → colour. ``yes`` has none, and whatever lies between is yellow."""

STATES: Mapping[State, str] = {"failed": RED, "not run": YELLOW}
"""State of a job → colour; others have none."""

_ORDER: tuple[State, ...] = ("waiting", "planned", "running", "done", "kept", "failed", "not run")

_MOST_ROWS = 40
"""Most rows of a table of groups; ``--full`` has no limit."""

_LABEL = 16
"""Columns that labels and margins of facts take."""


def print_inspection(found: Inspection, *, full: bool) -> None:
    """Print an adapter's facts, its modules and the engines. ``full`` lists every module in a separate row."""
    width = width_of(sys.stdout)
    show_layout([shortened(fit(found.adapter), width), *_head_lines(found, width, full=full)])
    show_layout(["", *_module_lines(found, width, full=full)])
    if found.engines:
        room = max(len(_engine_name(one)) for one in found.engines)
        show_layout(
            ["", "Engines:", *(line for one in found.engines for line in _engine_lines(one, width, room))]
        )


def _head_lines(found: Inspection, width: int | None, *, full: bool) -> list[str]:
    """Return the facts on an adapter; with ``full`` also its files and their digest."""
    ranks = ", ".join(f"{rank} ({count} ×)" for rank, count in found.rank_counts.items())
    if len(found.rank_counts) == 1:
        ranks = str(next(iter(found.rank_counts)))
    room = None if width is None else max(20, width - _LABEL)
    rows: list[tuple[str, Cell]] = [
        ("kind", f"{method_name(found.kind)} ({found.format})"),
        ("rank", ranks),
        ("modules", str(len(found.modules))),
        ("targets", found.targets),
        ("base", shortened(found.base, room)),
        ("base's weights", "; ".join(f"{count} as {words}" for words, count in found.storages.items())),
        ("trained by", found.framework),
        *((name, value) for name, value in found.settings.items()),
        *((name, value) for name, value in found.provenance.items() if value != found.base),
        ("tensors", size_text(found.nbytes)),
    ]
    rows += [("digest", found.digest), ("files", ", ".join(found.files))] if full else []
    return facts(rows, width)


def _module_lines(found: Inspection, width: int | None, *, full: bool) -> list[str]:
    """Return the table of modules, those of all layers in one row unless ``full``."""
    measured = any(one.delta_norm is not None for one in found.modules)
    # Where all are stored alike, the row on the base says how.
    is_mixed = len({one.storage for one in found.modules}) > 1
    columns = [Column("module")]
    columns += [] if full else [Column("", "number")]
    columns += [Column("kind", can_go=True), Column("rank", "number"), Column("scale", "number")]
    columns += [Column("shape", "number", can_go=True)]
    columns += [Column("stored as", can_go=True)] if is_mixed else []
    columns += [Column("‖Δ‖/‖W‖", "number")] if measured else []
    groups = [[one] for one in found.modules] if full else _grouped(found.modules)
    rows = [
        _module_row(members, full=full, is_mixed=is_mixed, measured=measured)
        for members in (groups if full else groups[:_MOST_ROWS])
    ]
    lines = grid(columns, rows, width)
    if not full and (left := cut(_MOST_ROWS, len(groups), "groups", "--full lists every module")):
        lines.append(f"  {left}")
    return lines


def _module_row(members: Sequence[ModuleFacts], *, full: bool, is_mixed: bool, measured: bool) -> list[Cell]:
    """Return the cells of a group of modules whose paths differ only in numbers."""
    cells: list[Cell] = [_path(members)]
    cells += [] if full else [f"{len(members)} ×"]
    cells += [
        _several(method_name(one.kind) for one in members),
        _span([one.rank for one in members if one.rank]),
        _span([one.scale for one in members if one.scale is not None]),
        _several("×".join(map(str, one.shape)) for one in members),
    ]
    cells += [_several(one.storage for one in members)] if is_mixed else []
    if measured:
        cells.append(_span([one.relative for one in members if one.relative is not None], ".2g"))
    return cells


def _path(members: Sequence[ModuleFacts]) -> str:
    """Return the path of a group, with ranges for its numbers: ``model.layers.0-31.self_attn.q_proj``."""
    pieces = [_NUMBER.split(one.path) for one in members]
    # Every second piece is a number.
    return "".join(
        ranges(map(int, column)).replace(", ", ",") if n % 2 else column[0]
        for n, column in enumerate(zip(*pieces, strict=True))
    )


def _grouped(modules: Sequence[ModuleFacts]) -> list[list[ModuleFacts]]:
    """Return modules in groups whose paths differ only in numbers."""
    groups: dict[str, list[ModuleFacts]] = {}
    for one in modules:
        groups.setdefault(_NUMBER.sub("*", one.path), []).append(one)
    return list(groups.values())


def _several(values: Iterable[str]) -> str:
    """Return the different values, three of them at most."""
    return listing(dict.fromkeys(values), 3)


def _span(values: Sequence[float], spec: str = "g") -> str:
    """Return one value, or the smallest and the largest; empty if there is none."""
    if not values:
        return ""
    low, high = format(min(values), spec), format(max(values), spec)
    return low if low == high else f"{low} to {high}"


def _engine_name(engine: EngineReport) -> str:
    return fit(f"{engine.engine} {engine.version}")


def _engine_lines(engine: EngineReport, width: int | None, room: int) -> list[str]:
    """Return an engine's verdict, the reasons against it, and the commands that help, which are never broken."""
    verdict = engine.verdict
    style = _VERDICTS.get(verdict, "" if verdict.startswith("yes") else YELLOW)
    lines = [f"  {_engine_name(engine):<{room}}  {styled(verdict, Mark('', style)) if style else verdict}"]
    for one in engine.obstacles:
        lines += wrapped(f"    - {fit(one.sentence)}", width, hang=6)
    lines += (f"    hint: {fit(cure)}" for cure in engine.cures)
    return lines


def print_conversion(report: ConvertReport, *, verbose: bool) -> None:
    """Print the modules that lost most; with ``verbose`` every module."""
    lossy = [one for one in report.modules if one.loss is not None]
    shown = report.modules if verbose else _worst(lossy)
    if not shown:
        return
    has_ranks = any(one.rank_before for one in shown)
    columns = [
        Column("module"),
        # An extraction has no rank before.
        *([Column("rank before", "number")] if has_ranks else []),
        Column("rank", "number"),
        Column("energy kept", "number"),
        Column("‖Δ-Δ′‖", "number", can_go=True),
        Column("‖Δ-Δ′‖/‖Δ‖", "number"),
    ]
    rows: list[list[Cell]] = []
    for one in shown:
        cells: list[Cell] = [one.path, *([str(one.rank_before or "")] if has_ranks else []), str(one.rank)]
        cells += (
            [f"{one.loss.energy:.6f}", f"{one.loss.residual:.3g}", f"{one.loss.relative:.3g}"]
            if one.loss is not None
            else ["all", "", ""]
        )
        rows.append(cells)
    title = "Modules:" if verbose else "What was lost, the most first:"
    say_layout([title, *grid(columns, rows, width_of(sys.stderr))])
    if not verbose and (left := cut(len(shown), len(lossy), way="-v lists all")):
        say(f"  {left}")


def _worst(lossy: Sequence[Written]) -> list[Written]:
    return sorted(lossy, key=lambda one: -(one.loss.relative if one.loss else 0.0))[:10]


def done_text(report: ConvertReport, out: str) -> str:
    """Return one line about a finished conversion.

    Args:
        report: on the conversion.
        out: the output, as the user named it.
    """
    whole = f", {counted(report.n_whole, 'tensor')} carried whole" if report.n_whole else ""
    transforms = ", ".join(report.transforms) or "rewritten"
    seconds = sum(report.seconds.values())
    return (
        f"wrote {out}: {counted(len(report.modules), 'module')}{whole}, {size_text(report.nbytes)} in {seconds:.1f} s "
        f"({transforms}); {report.kept}; read back"
    )


def _result(job: JobReport) -> str:
    """Return in a few words what a job did, or would do; empty if it did nothing."""
    match job.report:
        case None:
            return ""
        case Report(summary=found):
            n_tensors = found.n_merged + found.n_replaced + found.n_cast + found.n_copied
            return f"{found.n_merged} of {n_tensors} tensors merged"
        case report:
            return report.kept


def print_batch(report: BatchReport, *, only_failed: bool) -> None:
    """Print errors and warnings, then a table of all jobs, then totals."""
    for job in report.jobs:
        for group in alike(issue for issue in job.issues if issue.severity == "warning"):
            say_group(group, job.name)
        if job.message:
            say_lines(f"error: {printable(job.name)}: {job.message}")
            if job.hint:
                say(f"hint: {job.hint}")
    if not only_failed:
        say_layout(_job_lines(report, width_of(sys.stderr)))
    states = [(state, report.count(state)) for state in _ORDER]
    numbers = ", ".join(f"{n} {state}" for state, n in states if n)
    say(f"{counted(len(report.jobs), 'job')}: {numbers}, in {report.seconds:.1f} s")


def _job_lines(report: BatchReport, width: int | None) -> list[str]:
    """Return a table with a row for each job."""
    # By default a job's name is its output; one column is enough then.
    have_names = any(job.name != job.out for job in report.jobs)
    columns = [Column("job")] if have_names else []
    columns += [
        Column("output"),
        Column("state"),
        Column("seconds", "number"),
        Column("", "text", can_go=True),
    ]
    rows: list[list[Cell]] = [
        [
            *([job.name] if have_names else []),
            job.out,
            Mark(job.state, STATES[job.state]) if job.state in STATES else job.state,
            f"{job.seconds:.1f}" if job.seconds else "",
            _result(job),
        ]
        for job in report.jobs
    ]
    return [shortened(fit(report.file), width), *grid(columns, rows, width)]

"""Tables of adapters, conversions and batches."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_merge.cli.voice import add_row, say, say_lines, screen, styled, table
from lora_merge.cli.watching import STYLES
from lora_merge.core.report import Report
from lora_merge.words import alike, cut, listing, printable, ranges, size_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console as RichConsole

    from lora_merge.batches.reports import BatchReport, JobReport
    from lora_merge.conversion.lora import ConvertReport, Written
    from lora_merge.inspection.facts import Inspection, ModuleFacts
    from lora_merge.serving.engine_report import Obstacle

_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")

_STYLES = {"yes": "green", "no": "red"}
"""Verdict of an engine → colour; other verdicts are yellow."""

_MOST_ROWS = 40
"""Most rows of a table of groups; ``--full`` has no limit."""


def print_inspection(found: Inspection, *, full: bool) -> None:
    """Print an adapter's facts, its modules and the engines. ``full`` lists every module in a row of its own."""
    console = screen()
    _print_head(console, found)
    _print_modules(console, found, full=full)
    _print_engines(console, found)


def _print_head(console: RichConsole, found: Inspection) -> None:
    ranks = ", ".join(f"{rank} × {count}" for rank, count in found.rank_counts.items())
    rows = [
        ("kind", f"{found.kind} ({found.format})"),
        ("trained by", found.framework),
        ("base", found.base),
        ("base's weights", "; ".join(f"{count} as {words}" for words, count in found.storages.items())),
        ("targets", found.targets),
        ("modules", str(len(found.modules))),
        ("rank", ranks),
        *((name, value) for name, value in found.settings.items()),
        *((name, value) for name, value in found.provenance.items() if value != found.base),
        ("tensors", size_text(found.nbytes)),
        ("digest", found.digest),
        ("files", ", ".join(found.files)),
    ]
    shown = [(name, value) for name, value in rows if value]
    console.print(table("", "", title=found.adapter, rows=shown, head=False))


def _print_modules(console: RichConsole, found: Inspection, *, full: bool) -> None:
    measured = any(one.delta_norm is not None for one in found.modules)
    # Where all are stored alike, the row on the base says how.
    is_mixed = len({one.storage for one in found.modules}) > 1
    columns = ["module", "layers", "kind", "rank", "scale", "shape"]
    columns += ["stored as"] if is_mixed else []
    columns += ["‖Δ‖/‖W‖"] if measured else []
    made = table(*(columns if not full else [columns[0], *columns[2:]]), title="modules")
    groups = [[one] for one in found.modules] if full else _grouped(found.modules)
    for members in groups if full else groups[:_MOST_ROWS]:
        first = members[0]
        cells = [
            # Every second piece is a number, which the column of layers shows.
            "*".join(_NUMBER.split(first.path)[::2]) if not full else first.path,
            *([] if full else [ranges(_numbers(members))]),
            _several(one.kind for one in members),
            _span([one.rank for one in members if one.rank]),
            _span([one.scale for one in members if one.scale is not None]),
            _several("×".join(map(str, one.shape)) for one in members),
        ]
        if is_mixed:
            cells.append(_several(one.storage for one in members))
        if measured:
            cells.append(_span([one.relative for one in members if one.relative is not None], ".2g"))
        add_row(made, *cells)
    console.print(made)
    if len(groups) > _MOST_ROWS and not full:
        console.print(cut(_MOST_ROWS, len(groups), "groups", "--full lists every module"))


def _grouped(modules: Sequence[ModuleFacts]) -> list[list[ModuleFacts]]:
    """Return modules in groups whose paths differ only in numbers."""
    groups: dict[str, list[ModuleFacts]] = {}
    for one in modules:
        groups.setdefault(_NUMBER.sub("*", one.path), []).append(one)
    return list(groups.values())


def _numbers(members: Sequence[ModuleFacts]) -> list[int]:
    """Return the numbers of the layers: the first number of each path."""
    return sorted({int(match[1]) for one in members if (match := _NUMBER.search(one.path))})


def _several(values: Iterable[str]) -> str:
    """Return the different values, three of them at most."""
    return listing(dict.fromkeys(values), 3)


def _span(values: Sequence[float], spec: str = "g") -> str:
    """Return one value, or the smallest and the largest; empty if there is none."""
    if not values:
        return ""
    low, high = format(min(values), spec), format(max(values), spec)
    return low if low == high else f"{low} to {high}"


def _print_engines(console: RichConsole, found: Inspection) -> None:
    made = table("engine", "serves it", "why not, and what helps", title="engines")
    for engine in found.engines:
        lines = [f"- {one.sentence}" for one in engine.obstacles]
        lines += (f"  → {cure}" for cure in _cures(engine.obstacles))
        name = f"{engine.engine} {engine.version}"
        add_row(made, name, styled(engine.verdict, _STYLES.get(engine.verdict, "yellow")), tuple(lines))
    if found.engines:
        console.print(made)


def _cures(obstacles: Sequence[Obstacle]) -> list[str]:
    """Return the commands that help: conversions if they cure every obstacle, and the merge, which always helps."""
    if not obstacles:
        return []
    # An obstacle whose only cure is the merge makes conversions for the others useless.
    incurable = [one for one in obstacles if len(one.cures) == 1]
    own = [] if incurable else [cure for one in obstacles for cure in one.cures[:-1]]
    return list(dict.fromkeys([*own, obstacles[0].cures[-1]]))


def print_conversion(report: ConvertReport, *, verbose: bool) -> None:
    """Print the modules that lost most; with ``verbose`` every module."""
    lossy = [one for one in report.modules if one.loss is not None]
    shown = report.modules if verbose else _worst(lossy)
    if not shown:
        return
    title = "modules" if verbose else "what was lost, the most first"
    made = table("module", "rank before", "rank", "energy kept", "‖Δ-Δ′‖", "‖Δ-Δ′‖/‖Δ‖", title=title)
    for one in shown:
        cells = [one.path, str(one.rank_before or ""), str(one.rank)]
        cells += (
            [f"{one.loss.energy:.6f}", f"{one.loss.residual:.3g}", f"{one.loss.relative:.3g}"]
            if one.loss is not None
            else ["all", "", ""]
        )
        add_row(made, *cells)
    screen(stderr=True).print(made)
    if not verbose and len(lossy) > len(shown):
        say(cut(len(shown), len(lossy), way="-v lists all"))


def _worst(lossy: Sequence[Written]) -> list[Written]:
    return sorted(lossy, key=lambda one: -(one.loss.relative if one.loss else 0.0))[:10]


def done_text(report: ConvertReport) -> str:
    """Return one line about a finished conversion."""
    whole = f", {report.n_whole} tensors carried whole" if report.n_whole else ""
    transforms = ", ".join(report.transforms) or "rewritten"
    seconds = sum(report.seconds.values())
    return (
        f"{report.out}: {len(report.modules)} modules{whole}, {size_text(report.nbytes)} in {seconds:.1f} s "
        f"({transforms}); {_kept(report)}; read back"
    )


def _kept(report: ConvertReport) -> str:
    return "nothing lost" if report.loss is None else f"{report.loss.energy:.2%} of the energy kept"


def _result(job: JobReport) -> str:
    """Return in a few words what a job did, or would do; empty if it did nothing."""
    match job.report:
        case None:
            return ""
        case Report(summary=found):
            n_tensors = found.n_merged + found.n_replaced + found.n_cast + found.n_copied
            return f"{found.n_merged} of {n_tensors} tensors merged"
        case report:
            return _kept(report)


def print_batch(report: BatchReport, *, only_failed: bool) -> None:
    """Print a table of all jobs, then warnings, errors and totals."""
    if not only_failed:
        # By default a job's name is its output; one column is enough then.
        have_names = any(job.name != job.out for job in report.jobs)
        named = ("job", "output") if have_names else ("output",)
        made = table(*named, "", "seconds", "", title=report.file)
        for job in report.jobs:
            add_row(
                made,
                *((job.name, job.out) if have_names else (job.out,)),
                styled(job.state, STYLES[job.state]),
                f"{job.seconds:.1f}" if job.seconds else "",
                _result(job),
            )
        screen(stderr=True).print(made)
    for job in report.jobs:
        for group in alike(issue for issue in job.issues if issue.severity == "warning"):
            say(f"warning: {job.name}: {group}")
        if job.message:
            say_lines(f"error: {printable(job.name)}: {job.message}")
            if job.hint:
                say(f"hint: {job.hint}")
    states = [(state, report.count(state)) for state in STYLES]
    counted = ", ".join(f"{n} {state}" for state, n in states if n)
    say(f"{len(report.jobs)} job{'s' * (len(report.jobs) != 1)}: {counted}, in {report.seconds:.1f} s")

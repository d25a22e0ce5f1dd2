"""A merge as tables and lines: its plan, its result, and where the time went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.cli.voice import add_row, screen, table
from lora_merge.words import size_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.report import Foreseen, Report, Summary

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
    "check": "multiply rows for verification, take digests of some tiles",
    "change": "apply deltas",
    "encode": "round to the stored dtype, look for NaN",
    "wait": "wait for the GPU",
    "write": "write tiles",
}


def merge_text(report: Report) -> str:
    """Return one line about a finished merge."""
    summary, seconds = report.summary, sum(report.seconds.values())
    total = summary.merged_bytes + summary.replaced_bytes + summary.cast_bytes + summary.copied_bytes
    verdict = report.verdict
    checked = (
        f"verified {verdict.n_tensors} tensors, {verdict.n_projected} rows by projection, {verdict.n_rows} recomputed"
        if verdict.level != "none"
        else "not verified"
    )
    merged = f"merged {summary.n_merged} tensors, copied {summary.n_copied}"
    merged += f", replaced {summary.n_replaced}" if summary.n_replaced else ""
    merged += f", {_unchanged_word(summary)} {summary.n_cast}" if summary.n_cast else ""
    return f"{report.out}: {merged}, {size_text(total)} in {seconds:.1f} s; {checked}"


def print_plan(report: Report, *, verbose: bool) -> None:
    """Print the plan of a merge on stdout; with ``verbose`` also the rank of each parameter."""
    console = screen()
    console.print(table("", "", title="plan", rows=_plan_rows(report), head=False))
    if report.foreseen:
        print_foreseen(report.foreseen)
    if verbose and report.summary.module_ranks:
        console.print(table("parameter", "rank", title="ranks", rows=report.summary.module_ranks.items()))


def print_foreseen(foreseen: Mapping[str, Foreseen]) -> None:
    """Print what each rounding would keep of the adapters' change."""
    console = screen()
    n = len(next(iter(foreseen.values())).tensors)
    shown = table(
        "rounding", "change kept", "effect off by", "values unchanged", title=f"by a sample of {n} weights"
    )
    for method, one in foreseen.items():
        off = "-" if one.effect_error is None else f"{one.effect_error:.1%}"
        add_row(shown, method, f"{one.kept:.1%}", off, f"{one.unchanged:.1%}")
    console.print(shown)


def _plan_rows(report: Report) -> list[tuple[str, str]]:
    summary: Summary = report.summary
    return [
        ("base", report.base),
        ("adapter", ", ".join(report.adapters)),
        *([("output", report.out)] if report.out else []),
        ("tensors merged", f"{summary.n_merged} ({size_text(summary.merged_bytes)})"),
        ("tensors replaced", f"{summary.n_replaced} ({size_text(summary.replaced_bytes)})"),
        ("tensors copied", f"{summary.n_copied} ({size_text(summary.copied_bytes)})"),
        (f"tensors {_unchanged_word(summary)}", f"{summary.n_cast} ({size_text(summary.cast_bytes)})"),
        *_quantised_rows(summary.quantised),
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


def _unchanged_word(summary: Summary) -> str:
    """Return what happens to tensors that no delta changes and that are stored in another way."""
    return "decoded" if "decoded" in summary.quantised else "cast"


def _quantised_rows(numbers: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return rows on weights that are quantised, in the base or in the output; none where there are none."""
    rows = []
    if "decoded" in numbers:
        words = [f"{numbers['decoded']} decoded", f"{numbers['kept']} copied as they are stored"]
        if numbers["requantised"]:
            words.insert(1, f"{numbers['requantised']} with new codes")
        rows = [
            ("quantised weights", ", ".join(words)),
            *(
                (f"--out-storage {one}", f"weights of {size_text(numbers[f'{one}_bytes'])}")
                for one in ("dense", "mixed", "base")
            ),
        ]
    if "quantised" in numbers:
        rows.append(("weights quantised", str(numbers["quantised"])))
    return rows


def print_profile(report: Report) -> None:
    """Print the wall time of each phase, and the summed busy time of the workers in each stage."""
    console, n = screen(stderr=True), report.summary.n_workers
    phases = table("phase", "seconds", "", title="where each second went")
    for phase, seconds in report.seconds.items():
        add_row(phases, phase, f"{seconds:.2f}", _PHASES.get(phase, ""))
    add_row(phases, "all", f"{sum(report.seconds.values()):.2f}", "", style="bold")
    console.print(phases)
    if report.busy_seconds:
        stages = table("stage", "seconds", "", title=f"copy and merge: {n} worker{'s' * (n != 1)} together")
        for stage, what in _STAGES.items():
            if stage in report.busy_seconds:
                add_row(stages, stage, f"{report.busy_seconds[stage]:.2f}", what)
        add_row(stages, "all", f"{sum(report.busy_seconds.values()):.2f}", "", style="bold")
        console.print(stages)


def _counts(counts: Any) -> str:
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} × {count}" for value, count in counts.items())

"""The page of a merge, or of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.merging.survival import effect_error_of, kept_of
from lora_merge.peft_rules.method_names import method_name
from lora_merge.reporting.blocks import notices, provenance, times, with_warnings, worst
from lora_merge.reporting.data import result_data
from lora_merge.reporting.maps import kept_chart, kinds_table, noise_chart, points_of_survival, size_chart
from lora_merge.reporting.origin import near, origin_of
from lora_merge.reporting.page import Command, Fact, Facts, Page, State, Table, section, sections
from lora_merge.words import counted, rows_checked, size_text

if TYPE_CHECKING:
    from lora_merge.core.report import Foreseen, Report, Summary
    from lora_merge.reporting.page import Section


def merge_page(report: Report, command: str) -> Page:
    """Return the page of a finished merge, or of the plan of one."""
    origin = origin_of("" if report.dry_run else report.out, report.base)
    state, verdict = verdict_of(report)
    facts, adapters, files = provenance(origin)
    return Page(
        kind="Plan of a merge" if report.dry_run else "Merge",
        headline=report.headline or near(report.out),
        state=state,
        verdict=verdict,
        figures=figures_of(report),
        sections=sections(
            section("messages", "Messages", notices(report.issues)),
            section("merged", "What was merged", Facts(tuple(inputs_of(report)))),
            *_changes(report),
            section("time", "Time", times({} if report.dry_run else report.seconds)),
            section("provenance", "Provenance", facts, adapters, files),
            section("command", "Command", Command(command) if command else None),
        ),
        data=result_data(report),
    )


def verdict_of(report: Report) -> tuple[State, str]:
    """Return how a merge ended, as a state and in a sentence."""
    warned, state = with_warnings(report.issues), worst(report.issues)
    if report.dry_run:
        return ("plain" if state == "good" else state), f"Planned{warned}. Nothing was written."
    if report.was_complete:
        return (
            "plain" if state == "good" else state
        ), f"The output was complete already{warned}. Nothing was written."
    verdict = report.verdict
    if verdict.level == "none":
        return ("plain" if state == "good" else state), f"Merged{warned}. The output was not verified."
    how = "every value was recomputed" if verdict.level == "full" else "all checks passed"
    return state, f"Merged and verified{warned}: {how}."


def figures_of(report: Report) -> tuple[Fact, ...]:
    """Return the few numbers that matter most."""
    found = [Fact("tensors merged", str(report.summary.n_merged)), *_kept(report)]
    if report.dry_run:
        found += [
            Fact("disk needed", size_text(report.summary.disk_needed_bytes)),
            Fact("peak memory", f"~{size_text(report.summary.peak_bytes)}"),
        ]
    else:
        found += [
            Fact("written", size_text(0 if report.was_complete else _written_bytes(report.summary))),
            Fact("time", f"{sum(report.seconds.values()):.1f} s"),
        ]
    return tuple(found)


def _kept(report: Report) -> list[Fact]:
    if not report.survival:
        return []
    off = effect_error_of(report.survival)
    if off is None:
        return [Fact("change kept", f"{kept_of(report.survival):.1%}")]
    return [Fact("effect kept", f"{max(0.0, 1 - off):.1%}")]


def _written_bytes(summary: Summary) -> int:
    return summary.merged_bytes + summary.replaced_bytes + summary.cast_bytes + summary.copied_bytes


def inputs_of(report: Report) -> list[Fact]:
    """Return what was merged: names, counts, methods."""
    summary = report.summary
    counts = [
        ("merged", summary.n_merged, summary.merged_bytes),
        ("replaced by the adapter's", summary.n_replaced, summary.replaced_bytes),
        ("cast", summary.n_cast, summary.cast_bytes),
        ("copied", summary.n_copied, summary.copied_bytes),
    ]
    checked = report.verdict
    verified = f"{counted(checked.n_tensors, 'tensor')}; {rows_checked(checked.n_projected, checked.n_rows)}"
    return [
        Fact("base", near(report.base), is_code=True),
        *(Fact("adapter", one, is_code=True) for one in report.adapters),
        *([Fact("output", near(report.out), is_code=True)] if report.out else []),
        Fact(
            "method", ", ".join(f"{method_name(kind)} × {n}" for kind, n in summary.kinds.items()) or "none"
        ),
        *([Fact("rank", _counts(summary.ranks))] if summary.ranks else []),
        *([Fact("scale α/r", _counts(summary.scales))] if summary.scales else []),
        Fact("tensors", "; ".join(f"{n} {what} ({size_text(size)})" for what, n, size in counts if n)),
        *([Fact("verified", verified)] if checked.level != "none" else []),
        Fact(
            "files",
            f"{counted(summary.n_shards, 'weight file')}, {counted(summary.n_side_files, 'other file')}",
        ),
    ]


def _counts(counts: object) -> str:
    assert isinstance(counts, dict)
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} × {n}" for value, n in counts.items())


def _changes(report: Report) -> list[Section | None]:
    points = points_of_survival(report.survival, report.summary.module_ranks)
    return [
        section("kept", "How much is kept", kept_chart(points, "map-kept"), noise_chart(points, "map-noise")),
        section("size", "How large the changes are", size_chart(points, "map-size"), kinds_table(points)),
        section("foreseen", "What each rounding would keep", _foreseen(report)),
    ]


def _foreseen(report: Report) -> Table:
    def row(name: str, one: Foreseen) -> tuple[str, ...]:
        off = "–" if one.effect_error is None else f"{one.effect_error:.1%}"
        return name, f"{one.kept:.1%}", off, f"{one.unchanged:.1%}"

    columns = ("Rounding", "Change kept", "Effect off by", "Values unchanged")
    rows = tuple(row(name, one) for name, one in report.foreseen.items())
    return Table("By a sample of the weights", columns, rows, frozenset({1, 2, 3}))

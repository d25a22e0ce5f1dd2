"""A merge as lines: its plan, its result, and where the time went."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lora_merge.cli.layout import BOLD, YELLOW, Cell, Column, Mark, facts, grid, shortened
from lora_merge.cli.voice import say_layout, show, show_layout, width_of
from lora_merge.peft_rules.method_names import method_name
from lora_merge.storage.destination import UNKNOWN_BYTES
from lora_merge.words import between, counted, duration_text, listing, rows_checked, size_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.report import Foreseen, Report, Summary

_PHASES = {
    "start": "start Python, load the program",
    "plan": "read headers, match the adapter, lay out the output",
    "resume": "check what an interrupted run has written",
    "copy": "copy tensors that do not change",
    "load": "wait until torch is loaded",
    "merge": "merge the other tensors in float32",
    "seal": "write config, tokenizer and manifest",
    "verify": "verify the output",
    "flush": "wait until everything is on the disk",
    "publish": "give the output its name",
    "other": "all between these",
}
_STAGES = {
    "copy": "copy tensors that do not change",
    "digest": "compute digests of what is written",
    "prepare": "load factors",
    "read": "read tiles of the base",
    "decode": "convert them to float32",
    "check": "multiply rows for verification, compute digests of some tiles",
    "change": "apply the adapters",
    "encode": "round to the stored dtype, look for NaN",
    "wait": "wait for the GPU",
    "write": "write tiles",
}

_LABEL = 16
"""Columns that labels and margins of the plan take."""


def merge_lines(report: Report, out: str) -> list[str]:
    """Return two lines about a finished merge: what was written, and how it was verified; none if nothing was.

    Args:
        report: on the merge.
        out: the output, as the user named it.
    """
    summary, seconds = report.summary, sum(report.seconds.values())
    pushed = [f"on the Hub: {report.pushed}"] if report.pushed else []
    # A note says it.
    if report.was_complete:
        return pushed
    copied = (
        f", {size_text(report.store_copied_bytes)} of it copied by the store"
        if report.store_copied_bytes
        else ""
    )
    if report.part:
        return [
            f"wrote {out}, {report.part}{copied}; in {seconds:.1f} s",
            "not verified: --seal does, when all parts are made",
        ]
    total = summary.merged_bytes + summary.replaced_bytes + summary.cast_bytes + summary.copied_bytes
    merged = f"merged {counted(summary.n_merged, 'tensor')}, copied {summary.n_copied}"
    merged += f", replaced {summary.n_replaced}" if summary.n_replaced else ""
    merged += f", {_unchanged_word(summary)} {summary.n_cast}" if summary.n_cast else ""
    verdict = report.verdict
    checked = (
        f"verified {counted(verdict.n_tensors, 'tensor')}: {rows_checked(verdict.n_projected, verdict.n_rows)}"
        if verdict.level != "none"
        else "not verified"
    )
    return [f"wrote {out}: {merged}; {size_text(total)} in {seconds:.1f} s{copied}", checked, *pushed]


def print_plan(report: Report, named: Mapping[str, str], *, verbose: bool) -> None:
    """Print the plan of a merge on stdout; with ``verbose`` also the rank of each parameter.

    Args:
        report: of a dry run.
        named: ``base`` and ``out`` as the user named them, where they did.
        verbose: name each parameter.
    """
    width = width_of(sys.stdout)
    show(report.headline)
    show_layout(["", *facts(_plan_rows(report, named, width), width), ""])
    if report.foreseen:
        show_layout([*_foreseen_lines(report.foreseen, width), ""])
    if verbose and report.summary.module_ranks:
        columns = [Column("parameter"), Column("rank", "number")]
        rows = [(name, str(rank)) for name, rank in report.summary.module_ranks.items()]
        show_layout([*grid(columns, rows, width), ""])


def _foreseen_lines(foreseen: Mapping[str, Foreseen], width: int | None) -> list[str]:
    """Return a table of what each rounding would keep of the adapters' change."""
    n = len(next(iter(foreseen.values())).tensors)
    heads = ("rounding", "change kept", "effect off by", "values unchanged")
    columns = [Column(heads[0]), *(Column(head, "number") for head in heads[1:])]
    rows = [
        (
            method,
            f"{one.kept:.1%}",
            "-" if one.effect_error is None else f"{one.effect_error:.1%}",
            f"{one.unchanged:.1%}",
        )
        for method, one in foreseen.items()
    ]
    return [f"What each rounding keeps, by a sample of {counted(n, 'weight')}:", *grid(columns, rows, width)]


def _plan_rows(report: Report, named: Mapping[str, str], width: int | None) -> list[tuple[str, Cell]]:
    summary: Summary = report.summary
    room = None if width is None else max(20, width - _LABEL)
    base, out = named.get("base") or report.base, named.get("out") or report.out
    files = f"{counted(summary.n_shards, 'weight file')}, {counted(summary.n_side_files, 'side file')}"
    # A full disk is what stops a run, so it is the one number that is coloured.
    is_short = summary.disk_needed_bytes > summary.disk_free_bytes
    is_known = summary.disk_free_bytes < UNKNOWN_BYTES
    free = f"{size_text(summary.disk_needed_bytes)} needed, {size_text(summary.disk_free_bytes)} free"
    return [
        ("base", shortened(base, room)),
        ("adapter", ", ".join(report.adapters)),
        ("kind", _kinds(summary)),
        ("output", shortened(out, room)),
        *_tensor_rows(summary),
        *_quantised_rows(summary.quantised),
        ("files", files),
        ("", " "),
        ("time", _time(summary)),
        *(
            [("device", f"{report.workers['device']}: {report.workers['device_why']}")]
            if _is_telling(report)
            else []
        ),
        ("bytes", f"{size_text(summary.read_bytes)} read, {size_text(summary.disk_needed_bytes)} written"),
        ("peak memory", f"about {size_text(summary.peak_bytes)}"),
        *([("disk", Mark(free, YELLOW) if is_short else free)] if is_known else []),
    ]


def _is_telling(report: Report) -> bool:
    """Return True where the device is worth a line: a GPU, or a CPU that was weighed against one."""
    return report.workers.get("device") != "cpu" or "torch finds" in str(report.workers["device_why"])


def _kinds(summary: Summary) -> str:
    """Return the methods with their ranks and scales: ``LoRA, rank 16, scale 2``."""
    words = [_counts({method_name(kind): n for kind, n in summary.kinds.items()})]
    words += [f"rank {_counts(summary.ranks)}"] if summary.ranks else []
    words += [f"scale {_counts(summary.scales)}"] if summary.scales else []
    return "; ".join(words) if any("," in word for word in words) else ", ".join(words)


def _tensor_rows(summary: Summary) -> list[tuple[str, Cell]]:
    """Return what happens to how many tensors; a row for each action that happens."""
    found = (
        ("merged", summary.n_merged, summary.merged_bytes),
        ("replaced", summary.n_replaced, summary.replaced_bytes),
        (_unchanged_word(summary), summary.n_cast, summary.cast_bytes),
        ("copied", summary.n_copied, summary.copied_bytes),
    )
    shown = [(action, counted(n, "tensor"), size_text(nbytes)) for action, n, nbytes in found if n]
    first = max((len(text) for _, text, _ in shown), default=0)
    second = max((len(text) for *_, text in shown), default=0)
    return [(action, f"{text:>{first}}  {size:>{second}}") for action, text, size in shown]


def _time(summary: Summary) -> str:
    low, high = (duration_text(seconds) for seconds in summary.seconds)
    return f"{between(low, high)} with {counted(summary.n_workers, 'worker')}"


def _unchanged_word(summary: Summary) -> str:
    """Return what happens to tensors that no delta changes and that are stored in another way."""
    return "decoded" if "decoded" in summary.quantised else "cast"


def _quantised_rows(numbers: Mapping[str, int]) -> list[tuple[str, Cell]]:
    """Return rows on weights that are quantised, in the base or in the output; none where there are none."""
    rows: list[tuple[str, Cell]] = []
    if "decoded" in numbers:
        about = {"decoded": "decoded", "requantised": "with new codes", "kept": "copied as they are stored"}
        words = [f"{numbers[key]} {text}" for key, text in about.items() if numbers[key]]
        sizes = [f"{one} {size_text(numbers[f'{one}_bytes'])}" for one in ("dense", "mixed", "base")]
        rows = [("quantised", ", ".join(words)), ("--out-storage", ", ".join(sizes))]
    if "quantised" in numbers:
        rows.append(("quantised now", counted(numbers["quantised"], "weight")))
    return rows


def print_profile(report: Report, start: float | None, until_now: float | None) -> None:
    """Print the wall time of each phase, and the summed busy time of the workers in each stage.

    Args:
        report: on the merge.
        start: seconds until the program could begin; until_now: since the process began: then the phases add up to it. None
            where the process is another program's.
    """
    width, workers = width_of(sys.stderr), report.workers
    phases = dict(report.seconds)
    if start is not None and until_now is not None:
        other = until_now - start - sum(phases.values())
        phases = {"start": start, **phases, "other": max(other, 0.0)}
    say_layout(["", "Where the time went:", *_times("phase", phases, _PHASES, width)])
    if report.busy_seconds:
        why = f" ({workers['why']})" if "why" in workers else ""
        n = int(workers.get("n", report.summary.n_workers))
        title = f"Copying and merging, {counted(n, 'worker')} together{why}:"
        busy = {stage: report.busy_seconds[stage] for stage in _STAGES if stage in report.busy_seconds}
        say_layout(["", title, *_times("stage", busy, _STAGES, width)])


def _times(head: str, seconds: Mapping[str, float], about: Mapping[str, str], width: int | None) -> list[str]:
    columns = [Column(head), Column("seconds", "number"), Column("", "text", can_go=True)]
    rows: list[tuple[Cell, ...]] = [
        (name, f"{took:.2f}", about.get(name, "")) for name, took in seconds.items()
    ]
    rows.append((Mark("all", BOLD), f"{sum(seconds.values()):.2f}", ""))
    return grid(columns, rows, width)


def _counts(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return str(next(iter(counts)))
    return listing([f"{value} ({count} ×)" for value, count in counts.items()], 6)

"""The result of a verification: a line for each check, what differs, and forward passes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lora_merge.cli.issues import say_group
from lora_merge.cli.layout import RED, YELLOW, Cell, Column, Mark, cells, grid, shortened, styled, wrapped
from lora_merge.cli.voice import say, say_layout, show, show_layout, width_of
from lora_merge.redaction import fit
from lora_merge.reporting.data import not_run_words
from lora_merge.words import alike, cut

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.report import Issue, Proof

_LISTED = 30  # differences that are printed; --json has them all

_LISTED_QUIET = 3

_LEAST_ROOM = 24
"""Columns for a sentence beside a long name, where both have one line."""

_STATES: Mapping[str, Cell] = {
    "passed": "ok",
    "failed": Mark("FAILED", RED),
    "not asked": Mark("skipped", YELLOW),
}
"""State of a check → its word on a screen."""

_OF_VALUES = {"recorded", "untouched", "recompute", "layers"}
"""Checks that compare with recorded digests, or with values that are computed again."""


def print_proof(proof: Proof, *, failed: bool, verbose: bool) -> None:
    """Print a line for each check, what differs, and a conclusion."""
    width = width_of(sys.stdout)
    rows: list[tuple[Cell, ...]] = [
        (finding.check, _STATES[finding.state], finding.detail) for finding in proof.findings
    ]
    columns = [Column("check"), Column("result"), Column("what was checked", "text")]
    show_layout([shortened(fit(proof.headline or proof.out), width), "", *grid(columns, rows, width), ""])
    wrong = [(finding.check, issue) for finding in proof.findings for issue in finding.issues]
    errors = [(check, issue) for check, issue in wrong if issue.severity == "error"]
    if errors:
        _print_differences(errors, width)
    for group in alike(issue for _, issue in wrong if issue.severity != "error"):
        say_group(group)
    if proof.comparisons and (verbose or not proof.ok):
        show_layout([*_comparison_lines(proof, width), ""])
    show(_conclusion(proof))
    verdict = _verdict(proof, failed=failed)
    show_layout([styled(line, Mark(line, RED)) if failed else line for line in wrapped(verdict, width)])
    if failed and (hint := _hint(errors)):
        say(f"hint: {hint}")


def say_failed(proof: Proof, out: str) -> None:
    """Print that a verification failed, and what differs first, each in a line of the terminal or two.

    Args:
        proof: what was found.
        out: the output, as the user named it.
    """
    errors = [
        (finding.check, issue)
        for finding in proof.findings
        for issue in finding.issues
        if issue.severity == "error"
    ]
    # Several checks may find one tensor. Under --strict there may be warnings alone.
    wrong: dict[str, Issue] = {}
    for issue in [issue for _, issue in errors] or proof.issues:
        wrong.setdefault(issue.subject, issue)
    width = width_of(sys.stderr) if sys.stderr.isatty() else None
    say(f"error: {out}: verification failed")
    for issue in list(wrong.values())[:_LISTED_QUIET]:
        say_layout(_beginning(issue, width))
    if left := cut(_LISTED_QUIET, len(wrong)):
        say(f"  {left}")
    say(f"hint: {_hint(errors) or 'the same command without -q shows all checks'}")


def _beginning(issue: Issue, width: int | None) -> list[str]:
    """Return the first line of an issue. One with a long name has a second line, for what is wrong with it."""
    lines = wrapped(f"  {fit(issue.line)}", width and width - 2, hang=4)
    n = 1 if width is None or cells(issue.subject) <= width - _LEAST_ROOM else 2
    return [*lines[: n - 1], f"{lines[n - 1]} …"] if len(lines) > n else lines


def _print_differences(errors: list[tuple[str, Issue]], width: int | None) -> None:
    """Print the errors of a verification, check by check, similar ones together."""
    groups = [
        (check, group)
        for check in dict(errors)
        for group in alike(issue for where, issue in errors if where == check)
    ]
    lines = ["What differs:"]
    for check, group in groups[:_LISTED]:
        lines += wrapped(f"  {fit(check)}: {group.line}", width, hang=4)
        if group.hint:
            lines += wrapped(f"    hint: {fit(group.hint)}", width, hang=6)
    show_layout(lines)
    if left := cut(_LISTED, len(groups), way="--json lists them all"):
        show(f"  {left}")
    show("")


def _conclusion(proof: Proof) -> str:
    """Return what was checked, and what was not."""
    lines = [f"checked: {'; '.join(proof.checked)}"]
    if proof.not_checked:
        lines.append(f"not checked: {'; '.join(proof.not_checked)}")
    return "\n".join(lines)


def _verdict(proof: Proof, *, failed: bool) -> str:
    """Return the last line: the result."""
    if failed:
        return "verification failed"
    if left := not_run_words(proof):
        return f"verified in part: {left}"
    # The first check is of the structure alone.
    if len(proof.checked) > 1:
        return "verified: all checks passed"
    return "the structure is sound; the values of the weights were not checked"


def _hint(errors: list[tuple[str, Issue]]) -> str:
    """Return what to do about a failed verification; empty where nothing is known to help."""
    if not errors:
        return "--strict counts warnings as errors"
    checks = {check for check, _ in errors}
    if (
        other := [issue.hint for _, issue in errors if issue.code == "other-rounding"]
    ) and "planned" not in checks:
        return other[0]
    # With another adapter or base, a recomputation differs for that reason.
    if checks & _OF_VALUES and "planned" not in checks:
        return "merge again, or restore the output from a copy; verify --json lists everything that differs"
    return next((issue.hint for _, issue in errors if issue.hint), "")


def _comparison_lines(proof: Proof, width: int | None) -> list[str]:
    """Return a table with a row for each prompt and engine."""
    columns = [
        Column("engine"),
        Column("prompt"),
        Column("max |Δ|", "number"),
        Column("tolerance", "number"),
        Column("KL", "number", can_go=True),
        Column("top-1", "number", can_go=True),
        Column("first diverging", "number", can_go=True),
    ]
    rows: list[tuple[Cell, ...]] = []
    for one in proof.comparisons:
        diverging = "none" if one.first_diverging is None else f"{one.first_diverging + 1} of {one.n_tokens}"
        difference = f"{one.max_difference:.3g}"
        rows.append(
            (
                one.engine,
                one.prompt,
                difference if one.ok else Mark(difference, RED),
                f"{one.tolerance:.3g}",
                "" if one.kl is None else f"{one.kl:.2g}",
                "" if one.top1 is None else f"{one.top1:.1%}",
                diverging if one.n_tokens else "",
            )
        )
    return ["Forward passes:", *grid(columns, rows, width)]

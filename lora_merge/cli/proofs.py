"""The result of a verification: tables of checks, of differences and of forward passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.cli.voice import add_row, say, screen, show, styled, table
from lora_merge.words import alike, cut

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.table import Table

    from lora_merge.core.report import Issue, Proof

_LISTED = 30  # rows of a table of what differs; --json has them all
_STYLES = {"passed": "green", "failed": "red", "not asked": "yellow"}


def print_proof(proof: Proof, *, failed: bool, verbose: bool) -> None:
    """Print a line for each check, a table of what differs, and a conclusion."""
    console = screen()
    rows = [
        (finding.check, styled(finding.state, _STYLES[finding.state]), finding.detail)
        for finding in proof.findings
    ]
    console.print(table("check", "", "of what", title=proof.out, rows=rows))
    wrong = [(finding.check, issue) for finding in proof.findings for issue in finding.issues]
    for _, issue in wrong:
        if issue.severity != "error":
            say(f"{issue.severity}: {issue}")
    errors = [(check, issue) for check, issue in wrong if issue.severity == "error"]
    if errors:
        _print_differences(console, errors)
    if proof.comparisons and (verbose or not proof.ok):
        console.print(_comparison_table(proof))
    show(_conclusion(proof, failed=failed))


def _print_differences(console: RichConsole, errors: list[tuple[str, Issue]]) -> None:
    """Print the errors of a verification, check by check, similar ones together."""
    rows = [
        (check, group)
        for check in dict(errors)
        for group in alike(issue for where, issue in errors if where == check)
    ]
    differs = table("check", "what", "found", title="what differs")
    for check, group in rows[:_LISTED]:
        sentence = f"{group.sentence} ({group.hint})" if group.hint else group.sentence
        add_row(differs, check, group.subject, sentence)
    console.print(differs)
    if left := cut(_LISTED, len(rows), way="--json lists them all"):
        show(left)


def _conclusion(proof: Proof, *, failed: bool) -> str:
    """Return the last lines: what was checked, what was not, and the result."""
    lines = [f"checked: {'; '.join(proof.checked)}"]
    if proof.not_checked:
        lines.append(f"not checked: {'; '.join(proof.not_checked)}")
    if failed:
        lines.append("verification failed")
    # The first check is of the structure alone.
    elif len(proof.checked) > 1:
        lines.append("verified: no check found a difference")
    else:
        lines.append("the structure is sound; the values of the weights were not checked")
    return "\n".join(lines)


def _comparison_table(proof: Proof) -> Table:
    """Return a table with a row for each prompt and engine."""
    columns = ("engine", "prompt", "max |Δ|", "tolerance", "KL", "top-1", "first diverging")
    made = table(*columns, title="forward passes")
    for one in proof.comparisons:
        diverging = "none" if one.first_diverging is None else f"{one.first_diverging + 1} of {one.n_tokens}"
        add_row(
            made,
            one.engine,
            one.prompt,
            styled(f"{one.max_difference:.3g}", "" if one.ok else "red"),
            f"{one.tolerance:.3g}",
            "" if one.kl is None else f"{one.kl:.2g}",
            "" if one.top1 is None else f"{one.top1:.1%}",
            diverging if one.n_tokens else "",
        )
    return made

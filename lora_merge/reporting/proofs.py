"""The page of a verification."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from lora_merge.reporting.blocks import notices, provenance, times, with_warnings, worst
from lora_merge.reporting.data import not_run_words, proof_data
from lora_merge.reporting.maps import (
    Point,
    kept_chart,
    kinds_table,
    module_of,
    noise_chart,
    points_of_manifest,
    size_chart,
)
from lora_merge.reporting.origin import near, origin_of
from lora_merge.reporting.page import Command, Fact, Facts, Mark, Page, State, Table, section, sections
from lora_merge.words import counted

if TYPE_CHECKING:
    from lora_merge.core.report import Proof

_STATES: dict[str, State] = {"passed": "good", "failed": "bad", "not asked": "plain"}

_CHECKS = {
    "loadable": "Can engines load it?",
    "recorded": "Is it what its manifest recorded?",
    "planned": "Do base and adapter still fit?",
    "placed": "Is every tensor in its place?",
    "untouched": "Are unchanged tensors the base's?",
    "finite": "Are all values finite?",
    "recompute": "Are merged values right, recomputed?",
    "layers": "Are values right that PEFT's layers merge?",
    "forward": "Does the model answer as base and adapter?",
    "compared": "Was there anything to compare with?",
}
"""Check → the question that it asks."""


def proof_page(proof: Proof, command: str, *, failed: bool) -> Page:
    """Return the page of a verification.

    Args:
        proof: its result.
        command: that made it.
        failed: whether it counts as failed; a warning fails it under ``--strict``.
    """
    origin = origin_of(proof.out, proof.base)
    state, verdict = _verdict(proof, failed=failed)
    facts, adapters, files = provenance(origin)
    points = points_of_manifest(origin.table)
    wrong = _wrong_modules(proof, points)
    return Page(
        kind="Verification",
        headline=proof.headline or near(proof.out),
        state=state,
        verdict=verdict,
        figures=_figures(proof),
        sections=sections(
            section("messages", "Messages", notices(proof.issues)),
            section("checks", "Checks", _checks(proof), Facts(tuple(_scope(proof)))),
            section("engines", "Forward passes", _comparisons(proof)),
            section(
                "kept", "How much is kept", kept_chart(points, "map-kept"), noise_chart(points, "map-noise")
            ),
            section(
                "size",
                "How large the changes are",
                size_chart(points, "map-size", wrong),
                kinds_table(points),
            ),
            section("time", "Time", times(proof.seconds)),
            section("provenance", "Provenance", facts, adapters, files),
            section("command", "Command", Command(command) if command else None),
        ),
        data={"ok": not failed, **proof_data(proof)},
    )


def _verdict(proof: Proof, *, failed: bool) -> tuple[State, str]:
    if failed:
        n = sum(issue.severity == "error" for issue in proof.issues)
        why = counted(n, "error") if n else "warnings count as errors (--strict)"
        return "bad", f"Verification failed: {why}."
    state = worst(proof.issues)
    if left := not_run_words(proof):
        return state, f"Verified in part{with_warnings(proof.issues)}: {left}."
    if len(proof.checked) > 1:
        return state, f"Verified{with_warnings(proof.issues)}: all checks passed."
    return (
        "plain" if state == "good" else state
    ), "The structure is sound. The values of the weights were not checked."


def _figures(proof: Proof) -> tuple[Fact, ...]:
    states = [finding.state for finding in proof.findings]
    return (
        Fact("checks passed", f"{states.count('passed')} of {len(states)}"),
        Fact("errors", str(sum(issue.severity == "error" for issue in proof.issues))),
        Fact("warnings", str(sum(issue.severity == "warning" for issue in proof.issues))),
        Fact("time", f"{sum(proof.seconds.values()):.1f} s"),
    )


def _checks(proof: Proof) -> Table:
    rows = tuple(
        (
            Mark(finding.state, _STATES[finding.state]),
            _CHECKS.get(finding.check, finding.check),
            finding.check,
            finding.detail,
        )
        for finding in proof.findings
    )
    return Table(
        "What was checked",
        ("Result", "Question", "Check", "How much"),
        rows,
        code=frozenset({2}),
        is_titled=True,
    )


def _scope(proof: Proof) -> list[Fact]:
    found = [
        Fact("output", near(proof.out), is_code=True),
        *([Fact("base", near(proof.base), is_code=True)] if proof.base else []),
        *(Fact("adapter", near(one), is_code=True) for one in proof.adapters),
        Fact("checked", "; ".join(proof.checked) or "nothing"),
    ]
    return [*found, *([Fact("not checked", "; ".join(proof.not_checked))] if proof.not_checked else [])]


def _comparisons(proof: Proof) -> Table:
    rows = tuple(
        (
            Mark("agrees" if one.ok else "differs", "good" if one.ok else "bad"),
            one.engine,
            one.prompt,
            f"{one.max_difference:.3g}",
            f"{one.tolerance:.3g}",
            "–" if one.kl is None else f"{one.kl:.2g}",
            "–" if one.top1 is None else f"{one.top1:.1%}",
        )
        for one in proof.comparisons
    )
    columns = ("Result", "Engine", "Prompt", "Largest difference", "Tolerance", "KL", "Same top token")
    return Table("Merged checkpoint against base and adapter", columns, rows, frozenset({3, 4, 5, 6}))


def _wrong_modules(proof: Proof, points: Collection[Point]) -> frozenset[str]:
    """Return the paths of the modules that errors are about."""
    subjects = {module_of(issue.subject) for issue in proof.issues if issue.severity == "error"}
    return frozenset(subjects & {one.path for one in points})

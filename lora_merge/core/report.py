"""What a run says: issues, verdicts, the report, and the observer that hears of its progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from lora_merge.core.comparison import Comparison
from lora_merge.core.tensor import Survival
from lora_merge.words import printable

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Issue:
    """One thing that is wrong, or worth knowing, as data."""

    severity: Severity

    code: str
    """Stable and short, for scripts: ``"shape-mismatch"``."""

    subject: str
    """The tensor, module, file or field it is about."""

    sentence: str
    """What was found, then what was expected."""

    hint: str = ""
    """What to do about it."""

    def __str__(self) -> str:
        """Return ``subject: sentence``, then the hint on a separate line; both are fit to be printed."""
        return f"{self.line}\nhint: {printable(self.hint)}" if self.hint else self.line

    @property
    def line(self) -> str:
        """``subject: sentence``, as one line that is fit to be printed."""
        return printable(f"{self.subject}: {self.sentence}" if self.subject else self.sentence)


def error(code: str, subject: str, sentence: str, hint: str = "") -> Issue:
    """Return an issue that stops the merge."""
    return Issue("error", code, subject, sentence, hint)


def warning(code: str, subject: str, sentence: str, hint: str = "") -> Issue:
    """Return an issue that is reported, and stops the merge under ``--strict``."""
    return Issue("warning", code, subject, sentence, hint)


def note(code: str, subject: str, sentence: str) -> Issue:
    """Return an issue that is only worth knowing. It stops nothing, not even under ``--strict``."""
    return Issue("note", code, subject, sentence)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verification found."""

    level: Literal["none", "sample", "full"]
    """How much was checked."""

    n_tensors: int
    """Tensors checked."""

    n_rows: int
    """Rows recomputed in float64."""

    issues: tuple[Issue, ...] = ()

    n_projected: int = 0
    """Rows that were checked in part, by random projections, while they were merged; those that they suspect are recomputed."""

    @property
    def errors(self) -> tuple[Issue, ...]:
        """The issues that fail the verification."""
        return tuple(issue for issue in self.issues if issue.severity == "error")

    @property
    def notes(self) -> tuple[Issue, ...]:
        """The issues that fail nothing."""
        return tuple(issue for issue in self.issues if issue.severity != "error")

    @property
    def ok(self) -> bool:
        """True when no issue is an error; also at level ``"none"``, where nothing was asked."""
        return not self.errors


NOT_VERIFIED = Verdict("none", 0, 0)


@dataclass(frozen=True, slots=True)
class Summary:
    """A plan in numbers."""

    n_merged: int
    n_replaced: int
    """Tensors that are the adapter's own."""

    n_cast: int
    n_copied: int
    merged_bytes: int
    replaced_bytes: int
    cast_bytes: int
    copied_bytes: int
    n_shards: int
    n_side_files: int
    ranks: Mapping[str, int]
    """How many deltas have each rank."""

    scales: Mapping[str, int]
    """How many deltas have each scale."""

    kinds: Mapping[str, int]

    module_ranks: Mapping[str, int]
    """The rank of each parameter's change; the sum, where several adapters add theirs."""

    n_workers: int
    peak_bytes: int
    """Estimate of the resident memory of the merge."""

    disk_needed_bytes: int
    disk_free_bytes: int
    read_bytes: int = 0
    """Estimate of what is read of base and adapters."""

    seconds: tuple[float, float] = (0.0, 0.0)
    """Estimate of the time of the merge on a CPU: the least and the most that is likely."""

    quantised: Mapping[str, int] = field(default_factory=dict)
    """Of weights that are quantised in the base: how many are decoded and kept; bytes of the weights for each out-storage."""


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What a rounding would keep of the adapters' change, by a sample."""

    kept: float
    """⟨Δ′, Δ⟩ / ‖Δ‖² over all that was looked at."""

    effect_error: float | None
    """‖(Δ′ - Δ)Qᵀ‖ / ‖ΔQᵀ‖, see `Survival.effect_norm`; None where no change has an A."""

    unchanged: float
    """Share of the elements with a delta that would stay as they are."""

    tensors: Mapping[str, Survival]


@dataclass(frozen=True, slots=True)
class Report:
    """What one merge did."""

    base: str
    adapters: tuple[str, ...]
    """As the user named them, weights included."""

    out: str
    dry_run: bool
    summary: Summary
    issues: tuple[Issue, ...]

    verdict: Verdict = NOT_VERIFIED
    survival: Mapping[str, Survival] = field(default_factory=dict)
    """What the stored dtype kept of each merged tensor's delta."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall seconds of each phase, in order: plan, copy, load, merge, seal, verify, flush, publish."""

    busy_seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds that the workers spent on each stage of copying and merging, all workers together."""

    headline: str = ""
    """``Llama 8B, bf16 + LoRA r16 on 224 modules → dense bf16``."""

    foreseen: Mapping[str, Foreseen] = field(default_factory=dict)
    """Of a dry run that was asked for it: rounding → what it would keep."""

    part: str = ""
    """Which part of the output this was, with ``--part``: ``part 2 of 8 (3 of 24 files, 15 GB)``."""

    was_complete: bool = False
    """True where the output was there already, made from the same, and nothing was written."""

    store_copied_bytes: int = 0
    """Of the output's tensors that its store copied by itself (``--copies``)."""

    pushed: str = ""
    """Where the Hub shows the output, or its open pull request."""

    workers: Mapping[str, int | str] = field(default_factory=dict)
    """``n`` that merged, ``most`` that could have, and ``why``; ``device`` and ``device_why``. No ``n`` where nothing was merged."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check of an existing output."""

    check: str
    """Its name: ``"recorded"``, ``"forward"``, …"""

    detail: str
    """How much was checked, or why nothing was."""

    issues: tuple[Issue, ...] = ()
    asked: bool = True
    """False when the check could not be made, because base or adapter is missing."""

    @property
    def state(self) -> Literal["passed", "failed", "not asked"]:
        """The result in a word; a check without errors has passed, also if it has warnings."""
        if not self.asked:
            return "not asked"
        return "failed" if any(issue.severity == "error" for issue in self.issues) else "passed"

    @property
    def made(self) -> bool:
        """True where the check was asked for, and the manifest that it goes by could be read."""
        return self.asked and all(issue.code != "broken-manifest" for issue in self.issues)


SUBJECTS: Mapping[str, str] = {
    "loadable": "structure (what engines need to load it)",
    "recorded": "digests of all files (merge_manifest.json)",
    "recompute": "weights, compared with base and adapter",
    "forward": "outputs of the model (--forward)",
}
"""Check of an existing output → what it checks, in words. The first looks at the output alone."""


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of verifying an existing output."""

    out: str
    base: str
    """Empty where it was not found."""

    adapters: tuple[str, ...]
    findings: tuple[Finding, ...]
    comparisons: tuple[Comparison, ...] = ()
    """Of forward passes."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall seconds of each check."""

    headline: str = ""
    """As `Report.headline`, where base and adapter were found; otherwise the output alone."""

    @property
    def issues(self) -> tuple[Issue, ...]:
        """The issues of all checks, in their order."""
        return tuple(issue for finding in self.findings for issue in finding.issues)

    @property
    def ok(self) -> bool:
        """True when no check failed; a check that was not asked for does not fail."""
        return all(finding.state != "failed" for finding in self.findings)

    @property
    def checked(self) -> tuple[str, ...]:
        """What was checked, in the words of `SUBJECTS`."""
        made = {finding.check for finding in self.findings if finding.made}
        return tuple(words for check, words in SUBJECTS.items() if check in made)

    @property
    def not_checked(self) -> tuple[str, ...]:
        """What was not checked, in the words of `SUBJECTS`."""
        made = {finding.check for finding in self.findings if finding.made}
        return tuple(words for check, words in SUBJECTS.items() if check not in made)


class Observer(Protocol):
    """What watches a run: a progress bar, a log, or nothing (`Silence`). One thread at a time calls it, not always the same."""

    def phase(self, name: str, total_bytes: int) -> None:
        """Hear that a phase begins, with the bytes it will advance by (0: unknown)."""

    def advance(self, nbytes: int) -> None:
        """Hear that this many more bytes are done."""

    def done(self, name: str) -> None:
        """Hear that one tensor is finished."""


class Silence:
    """The observer that ignores everything."""

    def phase(self, name: str, total_bytes: int) -> None:
        """Ignore it."""

    def advance(self, nbytes: int) -> None:
        """Ignore it."""

    def done(self, name: str) -> None:
        """Ignore it."""

"""What a run says: issues, verdicts, the report, and the voice they are spoken with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

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
        """Return ``subject: sentence (hint)``."""
        text = f"{self.subject}: {self.sentence}" if self.subject else self.sentence
        return f"{text} ({self.hint})" if self.hint else text


def error(code: str, subject: str, sentence: str, hint: str = "") -> Issue:
    """Return an issue that stops the merge."""
    return Issue("error", code, subject, sentence, hint)


def warning(code: str, subject: str, sentence: str, hint: str = "") -> Issue:
    """Return an issue that is reported, and stops the merge under ``--strict``."""
    return Issue("warning", code, subject, sentence, hint)


def note(code: str, subject: str, sentence: str) -> Issue:
    """Return something worth knowing, which is nobody's fault."""
    return Issue("note", code, subject, sentence)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verification found."""

    level: Literal["none", "sample", "full"]
    """How much was looked at."""

    n_tensors: int
    """Tensors checked."""

    n_rows: int
    """Rows recomputed in float64."""

    issues: tuple[Issue, ...] = ()

    @property
    def errors(self) -> tuple[Issue, ...]:
        """Return the issues that fail the verification."""
        return tuple(issue for issue in self.issues if issue.severity == "error")

    @property
    def ok(self) -> bool:
        """Return True when nothing failed."""
        return not self.errors


NOT_VERIFIED = Verdict("none", 0, 0)


@dataclass(frozen=True, slots=True)
class Summary:
    """A plan in numbers."""

    n_merged: int
    n_cast: int
    n_copied: int
    merged_bytes: int
    cast_bytes: int
    copied_bytes: int
    n_shards: int
    n_side_files: int
    ranks: Mapping[str, int]
    """How many deltas have each rank."""

    scales: Mapping[str, int]
    """How many deltas have each scale."""

    peak_bytes: int
    """Estimate of the resident memory of the merge."""

    disk_needed_bytes: int
    disk_free_bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """What one merge did."""

    base: str
    adapter: str
    out: str
    dry_run: bool
    summary: Summary
    issues: tuple[Issue, ...]
    """Warnings and notes."""

    verdict: Verdict = NOT_VERIFIED
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall seconds of each phase: resolve, plan, merge, verify, finish."""


class Observer(Protocol):
    """Who watches a run: a progress bar, a log, nobody."""

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

"""Many merges and conversions: what became of each job of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from lora_merge.conversion.lora import ConvertReport
from lora_merge.core.report import Issue, Observer, Report

State = Literal["waiting", "planned", "running", "done", "kept", "failed", "not run"]
"""``kept``: its output was there already, and is what it would be."""


@dataclass(frozen=True, slots=True)
class JobReport:
    """What became of one job."""

    name: str
    kind: Literal["merge", "convert"]
    out: str
    state: State
    error: str = ""
    """Name of the class of what went wrong; empty when nothing did."""

    message: str = ""
    hint: str = ""
    issues: tuple[Issue, ...] = ()
    """Warnings and notes; of a job that failed, what was wrong."""

    seconds: float = 0.0
    """From when it was begun; of outputs that are made in one pass, the pass."""

    traceback: str = ""
    """Of an error inside lora-merge; empty otherwise."""

    report: Report | ConvertReport | None = None
    """Its own; of a merge that is planned, what it would do."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What became of a batch."""

    file: str
    jobs: tuple[JobReport, ...]
    seconds: float
    dry_run: bool = False

    @property
    def ok(self) -> bool:
        """Return True when every job has its output, or could have it."""
        wanted = {"planned", "kept"} if self.dry_run else {"done", "kept"}
        return all(job.state in wanted for job in self.jobs)

    def count(self, state: State) -> int:
        """Return how many jobs are in a state."""
        return sum(job.state == state for job in self.jobs)


class BatchObserver(Observer, Protocol):
    """Whoever watches a batch: an observer that hears of jobs, too."""

    def job(self, name: str, state: State, sentence: str = "") -> None:
        """Hear that a job has come into a state."""

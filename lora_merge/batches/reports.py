"""The report on a batch: the state of each job, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from lora_merge.conversion.lora import ConvertReport
from lora_merge.core.report import Issue, Observer, Report

State = Literal["waiting", "planned", "running", "done", "kept", "failed", "not run"]
"""``kept``: its output existed already and is up to date."""


@dataclass(frozen=True, slots=True)
class JobReport:
    """The report on one job."""

    name: str
    kind: Literal["merge", "convert"]
    out: str
    state: State
    error: str = ""
    """Name of the error's class; empty if there was none."""

    message: str = ""
    hint: str = ""
    issues: tuple[Issue, ...] = ()
    """Warnings and notes; of a failed job, its errors."""

    seconds: float = 0.0
    """Duration. Outputs that were made in one pass all have the pass's duration."""

    traceback: str = ""
    """Traceback of a bug in lora-merge; otherwise empty."""

    report: Report | ConvertReport | None = None
    """Its own report. For a planned merge, the report of a dry run."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """The report on a batch."""

    file: str
    jobs: tuple[JobReport, ...]
    seconds: float
    dry_run: bool = False

    @property
    def ok(self) -> bool:
        """True if every job has its output or, in a dry run, could make it."""
        wanted = {"planned", "kept"} if self.dry_run else {"done", "kept"}
        return all(job.state in wanted for job in self.jobs)

    def count(self, state: State) -> int:
        """Return the number of jobs in a state."""
        return sum(job.state == state for job in self.jobs)


class BatchObserver(Observer, Protocol):
    """An observer that also hears of the states of jobs."""

    def job(self, name: str, state: State, sentence: str = "") -> None:
        """Hear that a job has a new state; ``sentence`` says why, for errors and notes."""

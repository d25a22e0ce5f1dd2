"""Wall seconds of each phase of a run, and busy seconds of its workers."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Clock:
    """The time of one run. Only the driver of the run has it; others get its readings as values.

    Args:
        before: wall seconds of phases that are over.
    """

    def __init__(self, before: Mapping[str, float] | None = None) -> None:
        self._seconds = dict(before or {})
        self._busy: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the wall seconds of a block to those of a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._seconds[phase] = round(self._seconds.get(phase, 0.0) + spent, 4)

    def add_busy(self, seconds: Mapping[str, float]) -> None:
        """Add the busy seconds of a worker, by stage."""
        for stage, spent in seconds.items():
            self._busy[stage] += spent

    @property
    def seconds(self) -> dict[str, float]:
        """Wall seconds of each phase, in their order."""
        return dict(self._seconds)

    @property
    def busy_seconds(self) -> dict[str, float]:
        """Seconds that all workers together spent on each stage."""
        return {stage: round(spent, 4) for stage, spent in self._busy.items()}

"""Busy seconds of a worker, by stage: what `--profile` shows."""

from __future__ import annotations

import time
from collections import defaultdict


class Stopwatch:
    """Busy seconds of one worker by stage. One call to the clock for each lap."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._last = 0.0

    def start(self) -> None:
        """Begin to count: the time before counts for no stage."""
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the time since the last lap to a stage."""
        now = time.perf_counter()
        self._seconds[stage] += now - self._last
        self._last = now

    def taken(self) -> dict[str, float]:
        """Return the seconds of each stage since the last call of this."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

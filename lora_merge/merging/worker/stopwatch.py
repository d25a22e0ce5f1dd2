"""Where the time of a worker goes."""

from __future__ import annotations

import time
from collections import defaultdict


class Stopwatch:
    """Busy seconds of one worker, stage by stage."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._last = 0.0

    def start(self) -> None:
        """Begin to count: what went before belongs to nobody."""
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Give a stage the time since the last lap."""
        now = time.perf_counter()
        self._seconds[stage] += now - self._last
        self._last = now

    def taken(self) -> dict[str, float]:
        """Return the seconds of each stage since this was called last."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

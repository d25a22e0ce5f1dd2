"""Where the time of every worker goes."""

from __future__ import annotations

import threading
import time
from collections import defaultdict


class Stopwatch:
    """Busy seconds of one worker, stage by stage, in `seconds`."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._last = 0.0

    def start(self) -> None:
        """Begin to count: what went before belongs to nobody."""
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Give a stage the time since the last lap."""
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now


class Stopwatches:
    """One stopwatch for every thread that asks."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._all: list[Stopwatch] = []

    def mine(self) -> Stopwatch:
        """Return the calling thread's."""
        found: Stopwatch | None = getattr(self._local, "watch", None)
        if found is None:
            found = self._local.watch = Stopwatch()
            self._all.append(found)
        return found

    def seconds(self) -> dict[str, float]:
        """Return the busy seconds of all workers together, stage by stage."""
        total: defaultdict[str, float] = defaultdict(float)
        for watch in self._all:
            for stage, seconds in watch.seconds.items():
                total[stage] += seconds
        return {stage: round(seconds, 4) for stage, seconds in total.items()}

"""Measures the progress of a run: bytes done of all, the rate of the last seconds, and the time that is left."""

from __future__ import annotations

import math

SMOOTHING_SECONDS = 4.0
"""Time constant of the rate: what happened so long ago counts for 1/e of what happens now."""

_FIRST_SECONDS = 1.0
_FIRST_SHARE = 0.005
"""No time that is left is given before this: the first bytes say little."""

_STALLED = 0.01
"""Below this share of the mean rate a run counts as stalled, and no time is given."""


class Meter:
    """Counts the bytes of a run over all its phases.

    The rate is smoothed by time and not by updates, so it does not depend on how often or in which portions progress is
    heard of.

    Args:
        now: seconds of a monotonic clock, at the start.
    """

    def __init__(self, now: float) -> None:
        self.phase, self.done, self.total = "starting", 0, 0
        self._promised = 0
        self._began = self._last = self._phase_began = now
        self._weighted = 0.0
        self._paused: float | None = None
        """When a phase without bytes began; its time counts for no rate."""

    def begin(self, total_bytes: int, now: float) -> None:
        """Begin the run itself. What came before it, downloads for example, no longer counts.

        Args:
            total_bytes: of all phases together; 0: unknown.
            now: seconds of the clock.
        """
        self.done, self.total, self._promised = 0, total_bytes, total_bytes
        self._began = self._last = now
        self._weighted, self._paused = 0.0, None

    def enter(self, phase: str, total_bytes: int, now: float) -> None:
        """Begin a phase, with the bytes that it advances by (0: unknown)."""
        self.phase, self._phase_began = phase, now
        # Phases that the run did not promise (the factors of a conversion, for one) make the whole larger.
        self.total = max(self._promised, self.done + total_bytes)
        self.is_sized = total_bytes > 0
        self._resume(now)
        if not self.is_sized:
            self._paused = now

    is_sized = False
    """True where the present phase advances by bytes."""

    def add(self, nbytes: int, now: float) -> None:
        """Count bytes that are done."""
        self._resume(now)
        self.done += nbytes
        self.total = max(self.total, self.done)
        self._weighted = self._weighted * math.exp((self._last - now) / SMOOTHING_SECONDS) + nbytes
        self._last = now

    def _resume(self, now: float) -> None:
        """Take the time of a phase without bytes out of the rate."""
        if self._paused is not None:
            self._began += now - self._paused
            self._last += now - self._paused
            self._paused = None

    def share(self) -> float | None:
        """Return the part that is done, from 0 to 1; None where the whole is unknown."""
        return self.done / self.total if self.total else None

    def rate(self, now: float) -> float:
        """Return bytes per second, of the last seconds."""
        # The weights of all moments since the start add up to this, so the first seconds are not too low.
        weight = SMOOTHING_SECONDS * -math.expm1((self._began - now) / SMOOTHING_SECONDS)
        decayed = self._weighted * math.exp((self._last - now) / SMOOTHING_SECONDS)
        return decayed / weight if weight > 0 else 0.0

    def left(self, now: float) -> float | None:
        """Return the seconds that are left; None where they cannot be told yet."""
        took, rate = now - self._began, self.rate(now)
        if not self.total or took < _FIRST_SECONDS or self.done < _FIRST_SHARE * self.total:
            return None
        if rate <= _STALLED * self.done / took:
            return None
        return (self.total - self.done) / rate

    def phase_seconds(self, now: float) -> float:
        """Return how long the present phase has been running."""
        return now - self._phase_began


def clock_text(seconds: float) -> str:
    """Return a duration as a clock shows it.

    Example:
        >>> clock_text(7.6), clock_text(75), clock_text(3675)
        ('0:08', '1:15', '1:01:15')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

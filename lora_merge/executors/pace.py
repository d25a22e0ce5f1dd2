"""How many worker threads run at a time: more, as long as more get more done. It has no clock and no thread: it is told."""

from __future__ import annotations

from math import ceil

_GROWTH = 1.5
"""How many times as many workers are tried next."""

_SHARE = 0.3
"""Which part of the work that more workers could do at best they have to do, to be kept."""

_LEAST_SECONDS = 0.2
_LEAST_ROUNDS = 3
"""How long a number of workers is measured at least: seconds, and finished pieces for each worker."""

ALL = "as many as cores and memory allow"


class Pace:
    """Decides on the number of workers by the bytes that they finish in a second.

    It begins with a few and tries more. Where these do not finish clearly more, it goes back, and leaves it at that.

    Args:
        first: how many begin.
        most: how many there can be.

    Example:
        >>> pace = Pace(4, 8)
        >>> pace.n, pace.why
        (4, 'the merge ended before more were tried')
    """

    def __init__(self, first: int, most: int) -> None:
        self.n = min(first, most)
        """How many may run now."""

        self.why = ALL if self.n == most else "the merge ended before more were tried"
        """Why there are not more, in words."""

        self._most = most
        self._is_settled = self.n == most
        self._before: tuple[int, float] | None = None
        self._skipped, self._pieces, self._bytes = 0, 0, 0
        self._since: float | None = None

    def done(self, nbytes: int, now: float) -> int:
        """Take in a finished piece; return how many workers may run from now on.

        Args:
            nbytes: its size.
            now: seconds of any clock that only goes forward.
        """
        if self._is_settled:
            return self.n
        # Pieces that were begun with another number of workers say nothing of this one.
        if self._since is None:
            self._skipped += 1
            if self._skipped >= self.n:
                self._since, self._pieces, self._bytes = now, 0, 0
            return self.n
        self._pieces += 1
        self._bytes += nbytes
        seconds = now - self._since
        if self._pieces >= _LEAST_ROUNDS * self.n and seconds >= _LEAST_SECONDS:
            self._judge(self._bytes / seconds)
        return self.n

    def _judge(self, rate: float) -> None:
        """Take in bytes a second of the present number of workers: try more, or go back."""
        if self._before is not None:
            fewer, slower = self._before
            gain, best = rate / slower if slower else 1.0, self.n / fewer
            if gain < 1 + _SHARE * (best - 1):
                self.why = f"{self.n} finished {gain:.2f} times the bytes a second of {fewer}"
                self.n, self._is_settled = fewer, True
                return
        self._before = self.n, rate
        if self.n == self._most:
            self.why, self._is_settled = ALL, True
            return
        self.n = min(self._most, max(self.n + 1, ceil(self.n * _GROWTH)))
        self._skipped, self._since = 0, None

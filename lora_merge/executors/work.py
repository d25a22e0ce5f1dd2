"""What executors have to do with: work that knows its size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


class Sized(Protocol):
    """A step, a stretch of copies: something to do, with the bytes that it writes."""

    @property
    def nbytes(self) -> int:
        """Return its size."""


Work = TypeVar("Work", bound=Sized)
Result = TypeVar("Result")


class Executor(Protocol):
    """A way to run work.

    Args:
        do: does one piece of work; it may be called from several threads.
        work: all of it.
        n_workers: how many may be at it.
    """

    def __call__(
        self, do: Callable[[Work], Result], work: Sequence[Work], n_workers: int
    ) -> Iterable[Result]:
        """Yield the result of each piece of work."""

"""An observer of somebody's, heard for them: its own errors are known from those of the work."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.core.report import Observer


class Heard:
    """An observer that passes on what it hears, and remembers whether its own listener failed."""

    def __init__(self, other: Observer) -> None:
        self._other = other
        self.failure: BaseException | None = None
        """What the listener raised."""

    def phase(self, name: str, total_bytes: int) -> None:
        """Pass on that a phase begins."""
        with self._told():
            self._other.phase(name, total_bytes)

    def advance(self, nbytes: int) -> None:
        """Pass on how many more bytes are done."""
        with self._told():
            self._other.advance(nbytes)

    def done(self, name: str) -> None:
        """Pass on that a tensor is finished."""
        with self._told():
            self._other.done(name)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BaseException as exc:
            self.failure = exc
            raise

"""An observer around another one: it remembers an error that the other raised."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.core.report import Observer


class Heard:
    """Passes everything on to another observer, and remembers its failure.

    An error of the observer is its caller's, and ends the merge as an interrupt does: whole files stay. An error of
    the work is handled otherwise, so the driver compares it with `failure`.
    """

    def __init__(self, other: Observer) -> None:
        self._other = other
        self.failure: BaseException | None = None
        """What the other observer raised last."""

    def phase(self, name: str, total_bytes: int) -> None:
        """Pass on that a phase begins, and how many bytes it has."""
        with self._told():
            self._other.phase(name, total_bytes)

    def advance(self, nbytes: int) -> None:
        """Pass on that ``nbytes`` more bytes of the phase are done."""
        with self._told():
            self._other.advance(nbytes)

    def done(self, name: str) -> None:
        """Pass on the name of a tensor that is written."""
        with self._told():
            self._other.done(name)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BaseException as exc:
            self.failure = exc
            raise

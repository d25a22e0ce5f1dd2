"""How long each phase takes."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Clock:
    """Wall seconds of each phase, in `seconds`; what workers were busy with, in `busy_seconds`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.busy_seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time that a block takes to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = round(time.perf_counter() - start, 4)

"""Commands that take turns, every second round in reverse order, so that a slow minute meets all of them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Protocol

from benchmarks.inputs import ensure
from benchmarks.measure import CACHES, files_in, settle, timed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.inputs import Place
    from benchmarks.measure import Sample

Round = dict[str, tuple["Sample", int]]
"""Name of a side → what its command took, and the bytes that it wrote."""


class Turn(Protocol):
    """One of those that take turns."""

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def base(self) -> Place:
        """What it merges into."""

    @property
    def adapter(self) -> Place:
        """What it merges."""

    def command(self, out: Path) -> list[str]:
        """Return the command that makes an output."""


def rounds_of(
    sides: Sequence[Turn], root: Path, n_rounds: int, kept: str, settle_s: float
) -> Iterator[Round]:
    """Yield each round. Every command is a fresh process; inputs are built first.

    Args:
        sides: those that take turns.
        root: a directory for outputs and logs, which is removed in the end.
        n_rounds: turns of each.
        kept: a key of `CACHES`: what is done to the page cache before each command.
        settle_s: seconds of rest before each.

    Raises:
        RunError: a command fails.
    """
    ensure({place.directory: place for side in sides for place in (side.base, side.adapter)}.values())
    for n in range(1, n_rounds + 1):
        found: Round = {}
        for side in sides if n % 2 else sides[::-1]:
            out = root / "out"
            settle(settle_s, root)
            root.mkdir(parents=True)
            CACHES[kept]([side.base.directory, side.adapter.directory])
            sample = timed(side.command(out), out=out, log=root / "log")
            found[side.name] = sample, sum(path.stat().st_size for path in files_in([out]))
        yield found
    shutil.rmtree(root, ignore_errors=True)

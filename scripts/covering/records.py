"""What was recorded of each test, and its files."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

OUT = "LORA_MERGE_COVERING"
"""Variable of the environment: the directory that each worker writes its record into."""

Arc = tuple[str, int, int]
"""Of a file: from a line to a line."""


@dataclass(frozen=True, slots=True)
class Test:
    """One test, and what it ran."""

    name: str
    """As pytest's node id."""

    seconds: float

    arcs: frozenset[int]
    """Numbers of arcs, as the record has them."""

    is_whole: bool
    """False where it started processes, whose lines were not seen."""

    @property
    def function(self) -> str:
        """Its name without the row."""
        return self.name.partition("[")[0]

    @property
    def is_row(self) -> bool:
        """True for one of a table."""
        return "[" in self.name


def write(path: Path, arcs: dict[Arc, int], tests: list[Test]) -> None:
    """Write the record of one worker."""
    path.write_bytes(pickle.dumps((list(arcs), tests)))


def read(directory: Path) -> list[Test]:
    """Return the tests of all workers, with one numbering of the arcs."""
    numbers: dict[Arc, int] = {}
    found: list[Test] = []
    for path in sorted(directory.glob("*.pickle")):
        arcs, tests = pickle.loads(path.read_bytes())
        own = [numbers.setdefault(arc, len(numbers)) for arc in arcs]
        found += [
            Test(one.name, one.seconds, frozenset(own[n] for n in one.arcs), one.is_whole) for one in tests
        ]
    return found

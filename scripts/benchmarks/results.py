"""What was measured, its medians and ratios, and its JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.cases import Case
from benchmarks.compare import Difference
from benchmarks.measure import Sample

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(slots=True)
class Outcome:
    """What was measured of one case."""

    case: Case
    base_bytes: int
    merged_share: float
    """Of the base's values, those that the adapter changes."""

    rounds: list[dict[str, Sample]] = field(default_factory=list)
    """By the name of the contender; some take part in the first rounds only."""

    differences: dict[str, Difference] = field(default_factory=dict)
    """Between our output and that of others, by contender."""

    failures: dict[str, str] = field(default_factory=dict)
    """Why a contender took no part, or no longer."""

    def names(self) -> list[str]:
        """Return the contenders that were measured, in their order."""
        return list(dict.fromkeys(name for samples in self.rounds for name in samples))

    def ours(self) -> list[str]:
        """Return the names under which lora-merge was measured."""
        return [name for name in self.names() if is_ours(name)]

    def values(self, name: str, quantity: str) -> list[float]:
        """Return a quantity of `Sample` in each round that has it."""
        told = (getattr(samples[name], quantity) for samples in self.rounds if name in samples)
        return [float(value) for value in told if value is not None]

    def middle(self, name: str, quantity: str) -> float | None:
        """Return the median of a quantity over the rounds; None where no round has it."""
        values = self.values(name, quantity)
        return median(values) if values else None

    def ratio(self, one: str, other: str, quantity: str, of: str | None = None) -> float | None:
        """Return the median over rounds of a quantity of one against `of` (the same) of another, round by round."""
        return (
            median(ratios) if (ratios := list(self._ratios(one, other, quantity, of or quantity))) else None
        )

    def _ratios(self, one: str, other: str, quantity: str, of: str) -> Iterator[float]:
        for samples in self.rounds:
            if one in samples and other in samples:
                above, below = getattr(samples[one], quantity), getattr(samples[other], of)
                if above is not None and below:
                    yield above / below

    def phases(self, name: str) -> dict[str, float]:
        """Return the median seconds of each phase that a contender tells."""
        told: dict[str, list[float]] = {}
        for samples in self.rounds:
            for phase, seconds in samples[name].phases.items() if name in samples else ():
                told.setdefault(phase, []).append(seconds)
        return {phase: median(values) for phase, values in told.items()}


def is_ours(name: str) -> bool:
    """Whether a contender is lora-merge."""
    return name.split("-", maxsplit=1)[0] == "ours"


@dataclass(slots=True)
class Results:
    """One run of the benchmark."""

    command: str
    """That made them, without paths."""

    date: str
    cache: str
    """What was done to the inputs before every run: a name of `measure.CACHES`."""

    machine: dict[str, Any]
    versions: dict[str, dict[str, str]]
    """Of each peer's own packages, by contender."""

    outcomes: list[Outcome] = field(default_factory=list)

    def write(self, file: Path) -> None:
        """Write everything as JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=2) + "\n")


def read(file: Path) -> Results:
    """Return what a file of results holds.

    Raises:
        ValueError: it is no file of results.
    """
    try:
        data = json.loads(file.read_text())
        outcomes = [_outcome(each) for each in data.pop("outcomes")]
        return Results(**data, outcomes=outcomes)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise ValueError(f"{file.name} has no results of this benchmark") from exc


def _outcome(data: dict[str, Any]) -> Outcome:
    case = Case(**data.pop("case"))
    rounds = [{name: Sample(**sample) for name, sample in samples.items()} for samples in data.pop("rounds")]
    differences = {name: _difference(each) for name, each in data.pop("differences").items()}
    return Outcome(case, rounds=rounds, differences=differences, **data)


def _difference(data: dict[str, Any]) -> Difference:
    values: dict[str, Any] = {
        key: tuple(each) if isinstance(each, list) else each for key, each in data.items()
    }
    return Difference(**values)

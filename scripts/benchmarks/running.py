"""The rounds: who runs when, on what, and what is removed again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import machine
from benchmarks.cases import ITEM_BYTES, TARGETS, Case
from benchmarks.compare import difference
from benchmarks.contenders import Contender
from benchmarks.inputs import Place, adapter_place, apart, base_place, ensure, shape_for
from benchmarks.measure import CACHES, RunError, Sample, settle, timed
from benchmarks.peers import Job
from benchmarks.results import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

REHEARSAL = Case(0.005, "bfloat16", "all", 8)
"""What other tools merge once before anything is timed: it loads their libraries, and shows whether they work."""


class RoomError(Exception):
    """The disk is too small."""


@dataclass(frozen=True, slots=True)
class Options:
    """How cases are run."""

    kinds: tuple[str, ...]
    """Of adapter."""

    runs: int
    peer_runs: int
    """Rounds that other tools take part in: the first ones."""

    peers_at: tuple[float, ...]
    """Sizes in GB that they take part at; empty: at all."""

    cache: str
    """What is done to the inputs before every run: a name of `CACHES`."""

    cache_dir: Path
    keep: bool
    """Keep the inputs that this run built."""

    settle_s: float


def run_all(
    options: Options,
    cases: Iterable[Case],
    entrants: list[Contender],
    done: Callable[[Outcome], None],
) -> None:
    """Run every case; those that share a base stand together, and it is removed after them if it was built here.

    Args:
        options: how.
        cases: what is merged.
        entrants: who takes turns.
        done: hears of each case when it is over.

    Raises:
        RoomError: the disk is too small for a case.
        RunError: cp or lora-merge failed.
    """
    subprocess.run([sys.executable, "-c", "import torch"], check=True)  # so that nobody pays for being first
    failures = rehearse(options, entrants)
    for _, group in groupby(cases, key=lambda case: (case.size_gb, case.dtype)):
        built: list[Place] = []
        try:
            for case in group:
                done(run_case(options, case, entrants, failures, built))
        finally:
            for place in () if options.keep else built:
                place.remove()


def rehearse(options: Options, entrants: list[Contender]) -> dict[str, str]:
    """Let every other tool merge a tiny model once; return why those that cannot do not."""
    others = [entrant for entrant in entrants if entrant.foreign]
    failures: dict[str, str] = {}
    if not others:
        return failures
    small, places = replace(options, settle_s=0), places_of(options, REHEARSAL)
    built: list[Place] = []
    try:
        built += ensure(places.values())
        for entrant in others:
            turn = Turn(small, REHEARSAL, entrant, places)
            try:
                turn.take()
                print(f"rehearsal: {entrant.name} works", flush=True)
            except RunError as exc:
                failures[entrant.name] = str(exc)
                print(f"rehearsal: {exc}", flush=True)
            finally:
                turn.clear()
    finally:
        for place in () if options.keep else built:
            place.remove()
    return failures


def run_case(
    options: Options, case: Case, entrants: list[Contender], failures: dict[str, str], built: list[Place]
) -> Outcome:
    """Return what every contender took on one case.

    Args:
        options: how.
        case: what is merged.
        entrants: who takes turns.
        failures: of contenders that are known not to work.
        built: takes the inputs that had to be built.
    """
    places = places_of(options, case)
    shape = shape_for(case.size_gb, case.dtype)
    base_bytes = shape.n_values() * ITEM_BYTES[case.dtype]
    outcome = Outcome(case, base_bytes, shape.merged_share(TARGETS[case.targets]))
    present = [entrant for entrant in entrants if takes_part(options, case, entrant)]
    turns = [Turn(options, case, entrant, places) for entrant in present]
    for turn in turns:
        turn.clear()  # what a run that was stopped has left
    outcome.failures = {
        entrant.name: failures[entrant.name] for entrant in present if entrant.name in failures
    }
    check_disk(case, present, places, base_bytes)
    built += ensure(places.values())
    for entrant in present:
        memory_bytes = base_bytes * entrant.memory_factor
        if entrant.foreign and (why := machine.shortage_of_memory(entrant.name, memory_bytes)):
            outcome.failures.setdefault(entrant.name, why)
    try:
        for number in range(1, options.runs + 1):
            outcome.rounds.append({})
            # Whoever comes second finds what the first has left: dirty pages, a warm processor.
            run_round(number, turns if number % 2 else turns[::-1], outcome)
    finally:
        for turn in turns:
            turn.clear()
    return outcome


def run_round(number: int, turns: list[Turn], outcome: Outcome) -> None:
    """Let everyone take a turn; in the first round, outputs are compared with ours, which stays until then."""
    ours: Turn | None = None
    for turn in turns:
        entrant, options = turn.entrant, turn.options
        name = entrant.name
        if name in outcome.failures or (entrant.foreign and number > options.peer_runs):
            continue
        try:
            sample = turn.take()
        except RunError as exc:
            if not entrant.foreign:
                raise
            outcome.failures[name] = str(exc)
            print(f"round {number} of {options.runs}: {exc}", flush=True)
            turn.clear()
            continue
        outcome.rounds[-1][name] = sample
        print(f"round {number} of {options.runs}: {name} {sample.wall_s:.2f} s", flush=True)
        if number == 1 and ours is None and entrant.group == "ours":
            ours = turn
            continue
        if number == 1 and ours is not None and entrant.kind == ours.entrant.kind:
            outcome.differences[name] = apart(difference, ours.checkpoint, turn.checkpoint)
        turn.clear()  # at once, so that everyone finds as much memory and disk free
    if ours is not None:
        ours.clear()


def takes_part(options: Options, case: Case, entrant: Contender) -> bool:
    """Whether a contender is wanted on a case."""
    return not entrant.foreign or not options.peers_at or case.size_gb in options.peers_at


def places_of(options: Options, case: Case) -> dict[str, Place]:
    """Return where the base of a case (``base``) and its adapters (by kind) are."""
    adapters = {kind: adapter_place(options.cache_dir, case, kind) for kind in options.kinds}
    return {"base": base_place(options.cache_dir, case), **adapters}


def check_disk(case: Case, entrants: Iterable[Contender], places: dict[str, Place], base_bytes: int) -> None:
    """Make sure that inputs and outputs of a case fit on the disk.

    Raises:
        RoomError: they do not.
    """
    shape = shape_for(case.size_gb, case.dtype)
    modules = [
        dims
        for path, dims in shape.module_shapes().items()
        if path.rpartition(".")[2] in TARGETS[case.targets]
    ]
    adapter_bytes = 4 * case.rank * shape.n_layers * sum(sum(dims) for dims in modules)
    inputs = sum(
        base_bytes if name == "base" else adapter_bytes for name, place in places.items() if not place.ready
    )
    n_copies = 1 + max((entrant.n_copies for entrant in entrants), default=0)  # ours stays to be compared
    directory = places["base"].directory.parent
    if why := machine.shortage_of_disk(str(case), inputs + n_copies * base_bytes, directory):
        raise RoomError(why)


@dataclass(frozen=True, slots=True)
class Turn:
    """A contender on a case."""

    options: Options
    case: Case
    entrant: Contender
    places: dict[str, Place]

    @property
    def job(self) -> Job:
        """Return what is merged, and where to."""
        name, cache_dir = self.entrant.name, self.options.cache_dir
        base, adapter = self.places["base"].directory, self.places[self.entrant.kind].directory
        out, scratch = cache_dir / f"out-{name}", cache_dir / f"scratch-{name}"
        return Job(base, adapter, out, scratch, self.case.dtype, self.case.rank)

    @property
    def checkpoint(self) -> Path:
        """Return where its output's weights are."""
        return self.job.out / self.entrant.weights

    def take(self) -> Sample:
        """Run the contender once and return what it took; its output stays.

        Raises:
            RunError: it fails.
        """
        job = self.job
        CACHES[self.options.cache]([job.base, job.adapter])
        settle(self.options.settle_s, job.out, job.scratch)
        job.scratch.mkdir()
        log = self.options.cache_dir / f"{self.entrant.name}.log"
        return timed(self.entrant.command(job), out=job.out, log=log, environment=self.entrant.environment)

    def clear(self) -> None:
        """Remove its output and what it needed on the way."""
        for directory in (self.job.out, self.job.scratch):
            shutil.rmtree(directory, ignore_errors=True)

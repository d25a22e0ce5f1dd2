"""Who takes turns: cp, lora-merge with each number of workers and kind of adapter, PEFT, other tools."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cases import KINDS
from benchmarks.machine import lora_merge
from benchmarks.peers import OFFLINE, PEERS, Job, Peer

GROUPS = ("cp", "ours", "peft", *PEERS)
"""What ``--only`` and ``--skip`` choose from."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One who takes turns."""

    name: str
    group: str
    """One of `GROUPS`."""

    kind: str
    """Of the adapter that it merges."""

    command: Callable[[Job], list[str]]
    n_copies: int = 1
    """How often the model is on the disk at the end of a run."""

    memory_factor: float = 0.0
    """Of the base's size: how much memory it may take."""

    weights: str = "."
    """Where the checkpoint is in its output."""

    environment: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of its own packages."""

    @property
    def foreign(self) -> bool:
        """Whether it is another tool."""
        return self.group not in ("cp", "ours")


def ours_with(kind: str, workers: int | None) -> str:
    """Return what lora-merge is called with a kind of adapter and a number of workers: ``ours-dora-2w``."""
    kinds = [] if kind == KINDS[0] else [kind]
    return "-".join(["ours", *kinds, *([] if workers is None else [f"{workers}w"])])


def our_command(workers: int | None, *, loaded: bool = False) -> Callable[[Job], list[str]]:
    """Return how lora-merge is run with a number of workers, or with its own.

    Args:
        loaded: in a process that has torch loaded before it begins.
    """
    program = [sys.executable, str(Path(__file__).with_name("loaded.py"))] if loaded else lora_merge()

    def command(job: Job) -> list[str]:
        places = ["--base", str(job.base), "--adapter", str(job.adapter), "--out", str(job.out)]
        threads = [] if workers is None else ["--workers", str(workers)]
        return [*program, *places, "--json", "--quiet", *threads]

    return command


def copy(job: Job) -> list[str]:
    """Copy the base: what moving its bytes costs."""
    return ["cp", "-r", str(job.base), str(job.out)]


def peft(job: Job) -> list[str]:
    """Merge as PEFT's documentation does it."""
    script = str(Path(__file__).with_name("peft_merge.py"))
    return [sys.executable, "-P", script, str(job.base), str(job.adapter), str(job.out), job.dtype]


def of_peer(peer: Peer, kind: str, cache: Path) -> Contender:
    """Return a peer that is installed as a contender."""
    programs = peer.directory(cache) / "bin"
    return Contender(
        peer.name,
        peer.name,
        kind,
        lambda job: peer.command(programs, job),
        n_copies=peer.n_copies,
        memory_factor=peer.memory_factor,
        weights=peer.weights,
        environment={**OFFLINE, **peer.environment},
        versions=peer.versions(cache),
    )


def contenders(
    groups: Iterable[str],
    kinds: tuple[str, ...],
    workers: tuple[int, ...],
    cache: Path,
    *,
    loaded: bool = False,
    before: Path | None = None,
) -> list[Contender]:
    """Return who takes turns, in their order.

    Args:
        groups: of `GROUPS`; peers that are not installed or not usable are left out.
        kinds: of adapter; lora-merge merges each, everyone else the first.
        workers: lora-merge runs with each of these numbers; empty: with its own.
        cache: where peers are installed.
        loaded: lora-merge takes part a second time, in processes that have torch loaded.
        before: another checkout of lora-merge, which takes part too: what a change costs.
    """
    first, counts = kinds[0], workers or (None,)
    made: list[Contender] = []
    for group in GROUPS:
        if group not in groups:
            continue
        if group == "cp":
            made.append(Contender("cp", group, first, copy))
        elif group == "ours":
            made += [
                Contender(ours_with(kind, n), group, kind, our_command(n)) for kind in kinds for n in counts
            ]
            if loaded:
                made += [
                    Contender(ours_with("loaded", n), group, first, our_command(n, loaded=True))
                    for n in counts
                ]
            if before is not None:
                environment = {"PYTHONPATH": str(before.absolute())}
                made += [
                    Contender(ours_with("before", n), group, first, our_command(n), environment=environment)
                    for n in counts
                ]
        elif group == "peft":
            made.append(Contender("peft", group, first, peft, memory_factor=1.3, environment=OFFLINE))
        elif not PEERS[group].unusable and PEERS[group].installed(cache):
            made.append(of_peer(PEERS[group], first, cache))
    return made

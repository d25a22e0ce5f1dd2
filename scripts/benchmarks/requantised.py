"""Merges that keep the storage of a quantised base, against the merge of a BF16 base of the same bytes; and `verify` of each output."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from benchmarks.cases import Case
from benchmarks.inputs import Place, base_place, ensure, shape_for
from benchmarks.machine import lora_merge
from benchmarks.measure import CACHES, Sample, files_in, settle, timed
from benchmarks.stages import SCHEMES, quantised_place
from benchmarks.stored import RANK, adapter_place, merging

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FIRST = "bf16, nearest"
"""What the others are compared with."""


@dataclass(frozen=True, slots=True)
class Side:
    """One merge of those that take turns."""

    name: str
    base: Place
    adapter: Place
    rounding: str
    keeps_storage: bool

    def command(self, out: Path) -> list[str]:
        """Return the command that makes an output, with the workers and the verification of every merge."""
        flags = ["--rounding", self.rounding, "--allow-loss", "--allow-again"]
        if self.keeps_storage:
            flags += ["--out-storage", "base"]
        return [*merging(self.base, self.adapter, out), *flags]

    def base_bytes(self) -> int:
        """Return the bytes of the base's files."""
        return sum(path.stat().st_size for path in files_in([self.base.directory]))


@dataclass(frozen=True, slots=True)
class Run:
    """A merge, and the verification of its output."""

    merge: Sample
    verify: Sample


def sides(cache: Path, size_gb: float, schemes: Iterable[str]) -> list[Side]:
    """Build what is missing, and return the merges. Every base has about the same bytes."""
    found = []
    for name in ("bf16", *schemes):
        nbytes = SCHEMES.get(name, 2.0)
        weights_gb = size_gb * 2 / nbytes
        plain = base_place(cache, Case(weights_gb, "bfloat16", "all", RANK))
        adapter = adapter_place(cache, f"{weights_gb:g}GB-bf16", plain, shape_for(weights_gb, "bfloat16"))
        base = plain if name == "bf16" else quantised_place(cache, weights_gb, name, plain, adapter)
        found += [
            Side(f"{name}, {rounding}", base, adapter, rounding, name != "bf16")
            for rounding in ("nearest", "adapter")
        ]
        ensure([plain, adapter, base])
    return found


def rounds_of(
    cache: Path, size_gb: float, schemes: Iterable[str], n_rounds: int, settle_s: float
) -> Iterator[str]:
    """Yield a line about each round; then print a table of medians. Every command is a fresh process, and inputs are in the page
    cache.

    Raises:
        RunError: a command fails.
    """
    todo, root = sides(cache, size_gb, schemes), cache / "requantised"
    out = root / "out"
    found: dict[str, list[Run]] = {side.name: [] for side in todo}
    for n in range(1, n_rounds + 1):
        for side in todo if n % 2 else todo[::-1]:
            settle(settle_s, root)
            root.mkdir(parents=True)
            inputs = [side.base.directory, side.adapter.directory]
            CACHES["warm"](inputs)
            merge = timed(side.command(out), out=out, log=root / "log")
            CACHES["warm"]([*inputs, out])
            verify = timed([*lora_merge(), "verify", str(out), "--json"], out=out, log=root / "verify")
            found[side.name].append(Run(merge, verify))
        yield f"round {n}: {FIRST} {found[FIRST][-1].merge.wall_s:.2f} s"
    settle(0, root)
    show(todo, found)


def show(todo: list[Side], found: dict[str, list[Run]]) -> None:
    """Print the medians; ratios are medians of the rounds' own."""
    table = Table(
        "merge",
        "base, GB",
        "whole, s",
        "s per GB",
        "per byte × bf16",
        "CPU, s",
        "MB",
        "verify, s",
        "verify × merge",
    )
    first_bytes = todo[0].base_bytes()
    for side in todo:
        runs, nbytes = found[side.name], side.base_bytes()
        walls = [run.merge.wall_s for run in runs]
        ratios = [
            (run.merge.wall_s / nbytes) / (first.merge.wall_s / first_bytes)
            for run, first in zip(runs, found[FIRST], strict=True)
        ]
        verified = [run.verify.wall_s / run.merge.wall_s for run in runs]
        table.add_row(
            side.name,
            f"{nbytes / 1e9:.2f}",
            f"{statistics.median(walls):.2f}",
            f"{statistics.median(walls) / nbytes * 1e9:.2f}",
            _spread(ratios),
            f"{statistics.median(run.merge.cpu_s for run in runs):.1f}",
            f"{max(run.merge.peak_rss_bytes for run in runs) / 1e6:.0f}",
            f"{statistics.median(run.verify.wall_s for run in runs):.2f}",
            _spread(verified),
        )
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

"""One base and one adapter, stored and rounded in several ways, which take turns; and PEFT's own merge."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from benchmarks import turns
from benchmarks.cases import Case
from benchmarks.inputs import Place, base_place, shape_for
from benchmarks.stored import RANK, adapter_place, fp8_place, merging

if TYPE_CHECKING:
    from collections.abc import Iterator

FIRST = "bf16, nearest"
"""What the others are compared with."""

SCHEMES = ("fp8", "int8", "int4", "mxfp4", "nvfp4")


@dataclass(frozen=True, slots=True)
class Side:
    """One merge of those that take turns."""

    name: str
    base: Place
    adapter: Place
    flags: tuple[str, ...]
    is_peft: bool = False

    def command(self, out: Path) -> list[str]:
        """Return the command that makes an output."""
        if self.is_peft:
            script = str(Path(__file__).with_name("peft_merge.py"))
            places = map(str, (self.base.directory, self.adapter.directory, out))
            return [sys.executable, "-P", script, *places, "bfloat16"]
        return [*merging(self.base, self.adapter, out), *self.flags]


def sides(cache: Path, size_gb: float) -> list[Side]:
    """Return the merges: into a BF16 base of this size, and onto the scales of an FP8 base with as many weights."""
    base = base_place(cache, Case(size_gb, "bfloat16", "all", RANK))
    shape = shape_for(size_gb, "bfloat16")
    adapter = adapter_place(cache, f"{size_gb:g}GB-bf16", base, shape)
    coded = fp8_place(cache, size_gb / 2)
    of_coded = adapter_place(cache, f"{size_gb / 2:g}GB-fp8", coded, shape_for(size_gb, "bfloat16"))
    return [
        Side(FIRST, base, adapter, ()),
        *(Side(f"bf16, {how}", base, adapter, ("--rounding", how)) for how in ("adapter", "stochastic")),
        *(
            Side(f"{scheme}, {how}", base, adapter, ("--quantize", scheme, "--rounding", how))
            for scheme in SCHEMES
            for how in ("nearest", "adapter")
        ),
        *(
            Side(
                f"FP8 base, {how}",
                coded,
                of_coded,
                ("--out-storage", "base", "--rounding", how, "--allow-loss"),
            )
            for how in ("nearest", "adapter")
        ),
        Side("PEFT", base, adapter, (), is_peft=True),
    ]


def rounds_of(cache: Path, size_gb: float, n_rounds: int, kept: str, settle_s: float) -> Iterator[str]:
    """Yield a line about each round; then print a table of medians. Every command is a fresh process.

    Raises:
        RunError: a command fails.
    """
    todo = sides(cache, size_gb)
    found = []
    for n, one in enumerate(turns.rounds_of(todo, cache / "rounded", n_rounds, kept, settle_s), 1):
        found.append(one)
        yield f"round {n}: {FIRST} {one[FIRST][0].wall_s:.2f} s"
    show([side.name for side in todo], found)


def show(names: list[str], found: list[turns.Round]) -> None:
    """Print seconds as medians, and ratios as medians of the rounds' own."""
    table = Table("merge", "merge part, s", "× nearest", "whole, s", "× nearest", "written, GB", "MB")
    for name in names:
        samples = [one[name] for one in found]
        parts = [sample.phases.get("merge", 0.0) for sample, _ in samples]
        part_ratios = [part / one[FIRST][0].phases["merge"] for part, one in zip(parts, found, strict=True)]
        whole_ratios = [one[name][0].wall_s / one[FIRST][0].wall_s for one in found]
        table.add_row(
            name,
            f"{statistics.median(parts):.2f}" if any(parts) else "",
            _ratio(part_ratios) if any(parts) else "",
            f"{statistics.median(sample.wall_s for sample, _ in samples):.2f}",
            _ratio(whole_ratios),
            f"{samples[0][1] / 1e9:.2f}",
            f"{max(sample.peak_rss_bytes for sample, _ in samples) / 1e6:.0f}",
        )
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)


def _ratio(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"

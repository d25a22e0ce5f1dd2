"""How fast each stage of the merge loop is, for bases in several storages that keep their storage, with one worker."""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.cases import TARGETS, Case
from benchmarks.inputs import Place, base_place, ensure, shape_for
from benchmarks.machine import lora_merge
from benchmarks.measure import CACHES, RunError, settle, timed
from benchmarks.stored import RANK, adapter_place, merging

if TYPE_CHECKING:
    from collections.abc import Iterator

FIRST = "bf16, nearest"
"""What the others are compared with."""

SCHEMES = {"fp8-block": 1 + 4 / 128**2, "int4": 0.5 + 2 / 128, "nvfp4": 0.5 + 1 / 16, "mxfp4": 0.5 + 1 / 32}
"""Bytes of a weight and its share of the scales, by scheme."""

STAGES = ("read", "decode", "change", "encode", "check", "digest", "write")


@dataclass(frozen=True, slots=True)
class Side:
    """One merge of those that take turns."""

    name: str
    base: Path
    adapter: Path
    rounding: str
    weight_bytes: float
    """Of a weight in the base."""

    def command(self, out: Path) -> list[str]:
        """Return the command that makes an output in the base's own storage, with one worker."""
        flags = [
            "--rounding",
            self.rounding,
            "--workers",
            "1",
            "--no-verify",
            "--allow-loss",
            "--allow-again",
        ]
        if self.weight_bytes < 2:
            flags += ["--out-storage", "base"]
        places = ["--base", str(self.base), "--adapter", str(self.adapter), "--out", str(out)]
        return [*lora_merge(), *places, "--json", "--quiet", *flags]


def quantised_place(cache: Path, size_gb: float, scheme: str, plain: Place, adapter: Place) -> Place:
    """Return the place of a base that lora-merge itself has quantised."""
    about = {**adapter.parameters, "scheme": scheme}
    return Place(cache / f"base-{size_gb:g}GB-as-{scheme}", about, build_quantised, (scheme, plain, adapter))


def build_quantised(directory: Path, scheme: str, plain: Place, adapter: Place) -> None:
    """Merge an adapter and quantise: any weights will do.

    Raises:
        RunError: the command fails.
    """
    shutil.rmtree(directory)
    command = [*merging(plain, adapter, directory), "--quantize", scheme, "--allow-loss", "--no-verify"]
    timed(command, out=directory, log=directory.with_name(f"{directory.name}.log"))


def sides(cache: Path, size_gb: float) -> list[Side]:
    """Build what is missing, and return the merges."""
    plain = base_place(cache, Case(size_gb, "bfloat16", "all", RANK))
    adapter = adapter_place(cache, f"{size_gb:g}GB-bf16", plain, shape_for(size_gb, "bfloat16"))
    ensure([plain, adapter])
    bases = {"bf16": (plain, 2.0)}
    for scheme, nbytes in SCHEMES.items():
        bases[scheme] = quantised_place(cache, size_gb, scheme, plain, adapter), nbytes
    ensure([base for base, _ in bases.values()])
    return [
        Side(f"{name}, {rounding}", base.directory, adapter.directory, rounding, nbytes)
        for name, (base, nbytes) in bases.items()
        for rounding in ("nearest", "adapter")
    ]


def rounds_of(cache: Path, size_gb: float, n_rounds: int, settle_s: float) -> Iterator[str]:
    """Yield a line about each round; then print a table of medians. Every command is a fresh process, and inputs are in the page
    cache.

    Raises:
        RunError: a command fails.
    """
    todo, root = sides(cache, size_gb), cache / "stages"
    shape = shape_for(size_gb, "bfloat16")
    weights = shape.merged_share(TARGETS["all"]) * shape.n_values()
    found: dict[str, list[dict[str, float]]] = {side.name: [] for side in todo}
    for n in range(1, n_rounds + 1):
        for side in todo if n % 2 else todo[::-1]:
            settle(settle_s, root)
            root.mkdir(parents=True)
            CACHES["warm"]([side.base, side.adapter])
            timed(side.command(root / "out"), out=root / "out", log=root / "log")
            found[side.name].append(_busy(root / "log"))
        yield f"round {n}: {FIRST} {sum(found[FIRST][-1].values()):.2f} s"
    shutil.rmtree(root, ignore_errors=True)
    show(todo, found, weights)


def _busy(log: Path) -> dict[str, float]:
    """Return the seconds of the merge loop's stages, from the document of ``--json``."""
    told: dict[str, Any] = json.loads(log.read_bytes())
    busy = told.get("busy_seconds")
    if not isinstance(busy, dict):
        raise RunError(f"{log.name} has no busy_seconds")
    return {stage: float(busy.get(stage, 0.0)) for stage in STAGES}


def show(todo: list[Side], found: dict[str, list[dict[str, float]]], weights: float) -> None:
    """Print million weights a second of each stage and of all, and the ratio to the first for each byte of the base."""
    table = Table("merge", *STAGES, "all", "per byte × bf16")
    for side in todo:
        runs = found[side.name]
        speeds = (_speed(weights, [run[stage] for run in runs]) for stage in STAGES)
        whole = [sum(run.values()) for run in runs]
        ratios = [
            (taken / side.weight_bytes) / (sum(first.values()) / todo[0].weight_bytes)
            for taken, first in zip(whole, found[FIRST], strict=True)
        ]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        table.add_row(side.name, *speeds, _speed(weights, whole), ratio)
    console = Console()
    console.width = max(console.width, 130)
    console.print("million weights a second, medians")
    console.print(table)


def _speed(weights: float, seconds: list[float]) -> str:
    middle = statistics.median(seconds)
    return f"{weights / middle / 1e6:.0f}" if middle >= 0.005 else ""

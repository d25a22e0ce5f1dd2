"""Several adapters of one base: separate merges against one batch, taking turns."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from benchmarks.inputs import adapter_place, base_place, ensure
from benchmarks.measure import CACHES, RunError, settle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.cases import Case

COMMAND = [sys.executable, "-m", "lora_merge"]

REST_SECONDS = 15
"""After old outputs are removed: the disk is still busy with that, and whoever comes first would pay for it."""


def rounds_of(cache: Path, cases: list[Case], n_rounds: int, kept: str) -> Iterator[str]:
    """Yield a line about each round, and one about all; every command is a fresh process.

    Args:
        cache: for inputs and outputs.
        cases: that share a base, one for each adapter.
        n_rounds: how many times each side has its turn.
        kept: ``warm`` where all inputs are in the page cache before each turn, ``cold`` where they are put out of it
            before each command, as between merges that lie hours apart.

    Raises:
        RunError: a command fails, or the outputs are not the same, byte for byte.
    """
    base = base_place(cache, cases[0])
    adapters = [adapter_place(cache, case, "lora") for case in cases]
    ensure([base, *adapters])
    root = cache / "together"
    outs = {side: [root / side / str(n) for n in range(len(cases))] for side in ("separate", "batch")}
    file = root / "batch.json"  # JSON is YAML
    ratios = []
    for n in range(1, n_rounds + 1):
        settle(REST_SECONDS, root)
        root.mkdir(parents=True)
        jobs = [
            {"base": str(base.directory), "adapter": str(place.directory), "out": str(out)}
            for place, out in zip(adapters, outs["batch"], strict=True)
        ]
        file.write_text(json.dumps({"jobs": jobs}))
        commands = {
            "separate": [
                [
                    *COMMAND,
                    "--base",
                    str(base.directory),
                    "--adapter",
                    str(place.directory),
                    "--out",
                    str(out),
                    "-q",
                ]
                for place, out in zip(adapters, outs["separate"], strict=True)
            ],
            "batch": [[*COMMAND, "batch", str(file), "-q"]],
        }
        sides = list(commands) if n % 2 else list(commands)[::-1]
        seconds = {}
        inputs = [base.directory, *(place.directory for place in adapters)]
        for side in sides:
            CACHES[kept](inputs)
            settle(5)
            seconds[side] = 0.0
            for command in commands[side]:
                if kept == "cold":
                    CACHES[kept](inputs)
                seconds[side] += _seconds_of(command)
        _compare(outs)
        ratios.append(seconds["batch"] / seconds["separate"])
        yield (
            f"round {n}: {len(cases)} separate merges {seconds['separate']:.1f} s, one batch {seconds['batch']:.1f} s: "
            f"{ratios[-1]:.2f} ×; the outputs are the same, byte for byte"
        )
    shutil.rmtree(root, ignore_errors=True)
    yield f"median of {n_rounds} rounds: {statistics.median(ratios):.2f} × (from {min(ratios):.2f} to {max(ratios):.2f})"


def _seconds_of(command: list[str]) -> float:
    began = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RunError(f"{' '.join(command[2:4])} failed: {result.stderr.strip()[-500:]}")
    return time.perf_counter() - began


def _compare(outs: dict[str, list[Path]]) -> None:
    """Raise where an output of the batch is not that of the merge on its own."""
    for alone, together in zip(outs["separate"], outs["batch"], strict=True):
        for path in sorted(alone.iterdir()):
            if subprocess.run(["cmp", "-s", path, together / path.name], check=False).returncode:
                raise RunError(f"{path.name} of {alone.name} differs")

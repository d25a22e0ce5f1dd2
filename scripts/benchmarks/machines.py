"""What a machine is worth: workers on its disk and in its memory against copies, and a GPU against its CPU."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.cases import Case
from benchmarks.inputs import adapter_place, base_place, ensure
from benchmarks.machine import lora_merge, machine, machine_line, usable_cores
from benchmarks.measure import CACHES, RunError, settle, timed

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKERS = (1, 2, 4, 8, 16)
TMPFS = Path("/dev/shm")
"""Of Linux; a folder of a random name is made in it."""
RANK = 16

HEAVY = {
    "--rounding adapter": ("lora", ["--rounding", "adapter"]),
    "--quantize nvfp4": ("lora", ["--quantize", "nvfp4"]),
    "DoRA": ("dora", []),
    "--combine ties": ("two", ["--combine", "ties"]),
    "--combine svd": ("two", ["--combine", "svd"]),
}
"""Merges with much arithmetic: the adapters that they take, and their options."""

NO_GPU = "There is no CUDA device: only the CPU was measured."


@dataclass(frozen=True, slots=True)
class Inputs:
    """Folders on one disk: a base, and adapters by what `HEAVY` calls them."""

    base: Path
    adapters: dict[str, tuple[Path, ...]]

    def merging(self, kind: str, out: Path, *flags: str) -> list[str]:
        """Return the command that merges adapters of a kind, and reports in JSON."""
        named = [word for path in self.adapters[kind] for word in ("--adapter", str(path))]
        places = ["--base", str(self.base), *named, "--out", str(out)]
        return [*lora_merge(), *places, "--json", "--quiet", "--allow-loss", *flags]


class Measuring:
    """Runs commands as long as there is time.

    Args:
        root: for outputs.
        n_rounds: of each command.
        settle_s: seconds of rest before each.
        until: a time of `time.monotonic`; what would begin later is left out.
    """

    def __init__(self, root: Path, n_rounds: int, settle_s: float, until: float) -> None:
        self._root, self._n_rounds, self._settle_s, self._until = root, n_rounds, settle_s, until

    def row(self, name: str, inputs: Inputs, command: list[str]) -> str:
        """Return a row of a table: medians of wall, processor and merging seconds, and what was said of workers.

        Raises:
            RunError: the command fails.
        """
        samples, told = [], {}
        for _ in range(self._n_rounds):
            if time.monotonic() > self._until:
                break
            settle(self._settle_s, self._root)
            self._root.mkdir(parents=True)
            CACHES["warm"]([inputs.base, *inputs.adapters["two"]])
            samples.append(timed(command, out=self._root, log=self._root.with_suffix(".log")))
            told = _workers(self._root.with_suffix(".log"))
        shutil.rmtree(self._root, ignore_errors=True)
        if not samples:
            return f"| {name} | | | | no time was left |"
        wall, cpu = (
            statistics.median(getattr(one, field) for one in samples) for field in ("wall_s", "cpu_s")
        )
        merging = [one.merge_phase_s for one in samples if one.merge_phase_s is not None]
        part = f"{statistics.median(merging):.2f}" if merging else ""
        said = f"{told['n']}: {told['why']}" if "why" in told else ""
        return f"| {name} | {wall:.2f} | {cpu:.2f} | {part} | {said} |"


def _workers(log: Path) -> dict[str, object]:
    try:
        told = json.loads(log.read_bytes())
    except ValueError:
        return {}
    found = told.get("workers")
    return found if isinstance(found, dict) else {}


HEAD = (
    "",
    "| | wall, s | processor, s | copy and merge, s | workers |",
    "| --- | ---: | ---: | ---: | --- |",
)


def tables_of(cache: Path, size_gb: float, n_rounds: int, settle_s: float, minutes: float) -> Iterator[str]:
    """Yield the lines of two tables for docs/performance.md. Inputs are in the page cache, outputs are new.

    Args:
        cache: for inputs and outputs on the disk.
        size_gb: of the base.
        n_rounds: of each command.
        settle_s: seconds of rest before each.
        minutes: for all of it, without the making of the inputs.

    Raises:
        RunError: a command fails.
    """
    here = _inputs(cache, size_gb)
    until = time.monotonic() + 60 * minutes
    about = machine(cache)
    yield f"{machine_line(about)}; a base of {size_gb:g} GB in bfloat16, medians of {n_rounds} rounds."
    for name, opened in (("disk", _on_disk(cache, here)), ("tmpfs", _in_memory(here, size_gb))):
        with opened as place:
            if place is None:
                yield f"There is not enough room in {TMPFS}: only the disk was measured."
                continue
            yield from ("", f"On {name}:", *HEAD)
            measuring = Measuring(place[0] / "machines", n_rounds, settle_s, until)
            yield from _copies_and_workers(measuring, *place)
    yield from ("", "Much arithmetic:", *HEAD)
    measuring, has_gpu = Measuring(cache / "machines", n_rounds, settle_s, until), _has_gpu()
    for name, (kind, flags) in HEAVY.items():
        for device in ("cpu", "cuda") if has_gpu else ("cpu",):
            out = cache / "machines" / "out"
            command = here.merging(kind, out, *flags, "--device", device, "--no-verify")
            yield measuring.row(f"{name}, {device}", here, command)
    if not has_gpu:
        yield from ("", NO_GPU)


def _copies_and_workers(measuring: Measuring, root: Path, inputs: Inputs) -> Iterator[str]:
    """Yield the rows of copies, one file after the other and in parallel, and of merges by several numbers of workers."""
    out, counts = root / "machines" / "out", [n for n in WORKERS if n <= max(2, usable_cores())]
    yield measuring.row("cp -r", inputs, ["cp", "-r", str(inputs.base), str(out)])
    script = str(Path(__file__).with_name("parallel_copy.py"))
    for n in counts[1:]:
        command = [sys.executable, "-P", script, str(inputs.base), str(out), str(n)]
        yield measuring.row(f"copy by {n} threads", inputs, command)
    for n in counts:
        yield measuring.row(f"LoRA, --workers {n}", inputs, inputs.merging("lora", out, "--workers", str(n)))
    yield measuring.row("LoRA, default", inputs, inputs.merging("lora", out))


def _inputs(cache: Path, size_gb: float) -> Inputs:
    """Build what is missing, and return where it is."""
    case, other = (Case(size_gb, "bfloat16", "all", rank) for rank in (RANK, RANK + 1))
    places = [
        base_place(cache, case),
        adapter_place(cache, case, "lora"),
        adapter_place(cache, other, "lora"),
        adapter_place(cache, case, "dora"),
    ]
    ensure(places)
    base, one, two, dora = (place.directory for place in places)
    return Inputs(base, {"lora": (one,), "two": (one, two), "dora": (dora,)})


@contextmanager
def _on_disk(cache: Path, inputs: Inputs) -> Iterator[tuple[Path, Inputs] | None]:
    yield cache, inputs


@contextmanager
def _in_memory(inputs: Inputs, size_gb: float) -> Iterator[tuple[Path, Inputs] | None]:
    """Yield a folder in memory and a copy of the inputs in it, until the block ends; None where there is not enough room."""
    needed = 2.5e9 * size_gb
    if not TMPFS.is_dir() or not os.access(TMPFS, os.W_OK) or shutil.disk_usage(TMPFS).free < needed:
        yield None
        return
    with tempfile.TemporaryDirectory(dir=TMPFS) as made:
        root = Path(made)
        base = shutil.copytree(inputs.base, root / "base")
        yield root, Inputs(base, inputs.adapters)


def _has_gpu() -> bool:
    """Return True where torch finds a CUDA device, asked in a process of its own."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


@click.command()
@click.option("--size", "size_gb", default=2.0, help="GB of the base.  [default: 2]")
@click.option("--rounds", "n_rounds", default=2, help="Turns of each command.  [default: 2]")
@click.option("--settle", "settle_s", default=1.0, help="Seconds of rest before every command.  [default: 1]")
@click.option(
    "--minutes",
    default=9.0,
    help="What would begin later is left out; inputs are built before.  [default: 9]",
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="A Markdown file for the tables."
)
def command(
    size_gb: float, n_rounds: int, settle_s: float, minutes: float, out: Path | None, cache_dir: Path
) -> None:
    """Show what workers, the disk, memory and a GPU of this machine are worth, against plain copies."""
    lines = []
    try:
        for line in tables_of(cache_dir.absolute(), size_gb, n_rounds, settle_s, minutes):
            lines.append(line)
            click.echo(line)
            if out is not None:
                # At each line: a machine may be taken away.
                out.write_text("\n".join(lines) + "\n")
    except RunError as exc:
        raise click.ClickException(str(exc)) from exc

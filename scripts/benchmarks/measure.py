"""Run a command in a process of its own, and take its time and its memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

MERGE_PHASES = ("copy", "merge")
"""Phases of lora-merge that move and compute the weights."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured run."""

    wall_s: float
    """Until the command returned."""

    durable_s: float
    """Until its output was on the disk."""

    cpu_s: float
    """User and system time together, with that of its children."""

    peak_rss_bytes: int
    """Of the largest of its processes."""

    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase, where the command tells them."""

    @property
    def merge_phase_s(self) -> float | None:
        """Seconds of copying and merging, without start-up; None where the command does not tell."""
        told = [self.phases[phase] for phase in MERGE_PHASES if phase in self.phases]
        return sum(told) if told else None

    @property
    def merge_part_s(self) -> float | None:
        """Seconds of merging alone, which workers share."""
        return self.phases.get("merge")


PATH = re.compile(r"(?<!\S)['\"(]?/\S*/")
"""The folders of an absolute path: they say where this machine keeps things, and end up in results."""


class RunError(Exception):
    """A command failed; the sentence says how, and where its output is."""


def timed(
    command: list[str], *, out: Path, log: Path, environment: Mapping[str, str] | None = None
) -> Sample:
    """Run a command and return what it took.

    Args:
        command: writes to `out`.
        out: a directory; waited for until it is on the disk.
        log: what the command prints: stdout here, stderr beside it in ``.err``.
        environment: on top of this process's own. Bytecode is kept as it is where a tool is installed.

    Raises:
        RunError: it fails.
    """
    errors = log.with_suffix(".err")
    environ = {**os.environ, **(environment or {})}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every start compiles the whole source
    with log.open("wb") as stdout, errors.open("wb") as stderr:
        told = launched(command, stdout.fileno(), stderr.fileno(), environ)
    if told["exit_code"] != 0:
        raise RunError(failure(Path(command[0]).name, told["exit_code"], errors))
    began = time.perf_counter()
    flush(out)
    durable_s = told["wall_s"] + time.perf_counter() - began
    return Sample(told["wall_s"], durable_s, told["cpu_s"], told["peak_rss_bytes"], phases_in(log))


def launched(command: list[str], stdout: int, stderr: int, environ: Mapping[str, str]) -> dict[str, Any]:
    """Run a command through the small program that measures it, and return what that tells."""
    reading, writing = os.pipe()
    launcher = [sys.executable, "-I", "-S", str(Path(__file__).with_name("launch.py")), str(writing)]
    with os.fdopen(reading) as told:
        try:
            subprocess.run(
                [*launcher, *command],
                stdout=stdout,
                stderr=stderr,
                env=environ,
                pass_fds=[writing],
                check=True,
            )
        except subprocess.CalledProcessError as exc:
            raise RunError(f"{command[0]} cannot be started") from exc
        finally:
            os.close(writing)
        measured: dict[str, Any] = json.loads(told.read())
    return measured


def failure(program: str, exit_code: int, errors: Path) -> str:
    """Return a sentence about a run that failed, with the last line that it printed."""
    how = "was killed, most likely for memory" if exit_code == -9 else f"failed with exit code {exit_code}"
    lines = errors.read_text(errors="replace").strip().splitlines()
    last = f": {PATH.sub('…/', lines[-1].strip())}" if lines else ""
    return f"{program} {how}{last} (see {errors.name} in the cache)"


def phases_in(log: Path) -> dict[str, float]:
    """Return the seconds of each phase from the document of ``lora-merge --json``; empty for other output."""
    try:
        told = json.loads(log.read_bytes())
    except ValueError:
        return {}
    seconds = told.get("seconds") if isinstance(told, dict) else None
    return {name: float(value) for name, value in seconds.items()} if isinstance(seconds, dict) else {}


def files_in(directories: Iterable[Path]) -> Iterator[Path]:
    """Yield all files in some directories."""
    for directory in directories:
        yield from (path for path in sorted(directory.rglob("*")) if path.is_file())


def flush(out: Path) -> None:
    """Wait until every file of an output is on the disk."""
    for path in files_in([out]):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def warm(inputs: Iterable[Path]) -> None:
    """Read input directories, so that they are in the page cache."""
    block = bytearray(2**24)
    for path in files_in(inputs):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(block):
                pass


def chill(inputs: Iterable[Path]) -> None:
    """Put input directories out of the page cache; Linux only."""
    for path in files_in(inputs):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())  # what is not on the disk yet stays in the cache
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


CACHES = {"warm": warm, "cold": chill}
"""What is done to the inputs before every run, by what the command line calls it."""


def settle(seconds: float, *outputs: Path) -> None:
    """Remove old outputs, let the disk finish, and wait.

    A virtual machine hands freed memory back to its host within a few seconds. Without the pause a command that
    writes at once gets warm pages for nothing, and one that starts up first does not.
    """
    for out in outputs:
        shutil.rmtree(out, ignore_errors=True)
    os.sync()
    time.sleep(seconds)

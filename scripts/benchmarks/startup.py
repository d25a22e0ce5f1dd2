"""What starts before the first byte is merged: seconds and modules of short commands, and of a second merge in one process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.cases import Case
from benchmarks.inputs import adapter_place, base_place, ensure

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAVY = (
    "torch", "numpy", "transformers", "peft", "accelerate", "scipy", "pandas", "sympy", "huggingface_hub.hf_api",
    "modelscope", "ray", "boto3", "botocore", "obstore", "pydantic", "rich", "yaml", "safetensors.torch",
)  # fmt: skip
"""Modules that take long to import."""

_LINE = re.compile(r"import time:\s+\d+ \|\s+\d+ \| +(?P<name>\S+)")

_TWICE = """
import json, sys, time
import lora_merge
seconds = []
for out in sys.argv[3:]:
    began = time.perf_counter()
    lora_merge.merge(base=sys.argv[1], adapter=sys.argv[2], out=out)
    seconds.append(time.perf_counter() - began)
print(json.dumps(seconds))
"""
"""Two merges by the Python functions in one process."""


@dataclass(frozen=True, slots=True)
class Start:
    """What one command did."""

    seconds: float
    modules: tuple[str, ...]
    """In the order in which their imports ended."""

    def first(self, name: str) -> int | None:
        """Return the place of the first import of a module or of something in it; None where there is none.

        Python's log may lack the line of a package that a thread imports.
        """
        found = (n for n, one in enumerate(self.modules) if one == name or one.startswith(f"{name}."))
        return next(found, None)

    @property
    def heavy(self) -> list[str]:
        """Return those of `HEAVY`."""
        return [name for name in HEAVY if self.first(name) is not None]


def started(*words: str) -> Start:
    """Run the command with some words, and return what it imported.

    Raises:
        CalledProcessError: it fails.
    """
    command = [sys.executable, "-X", "importtime", "-m", "lora_merge", *words]
    began = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    return Start(
        seconds, tuple(match["name"] for match in map(_LINE.match, done.stderr.splitlines()) if match)
    )


def merged_twice(base: Path, adapter: Path, root: Path) -> list[float]:
    """Return the seconds of two merges in one process.

    Raises:
        CalledProcessError: one fails.
    """
    places = map(str, (base, adapter, root / "first", root / "second"))
    done = subprocess.run([sys.executable, "-c", _TWICE, *places], check=True, capture_output=True, text=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def lines_of(cache: Path) -> Iterator[str]:
    """Yield a table of commands. Seconds include what Python's own log of imports costs."""
    case = Case(0.005, "bfloat16", "all", 4)
    base, adapter = base_place(cache, case), adapter_place(cache, case, "lora")
    ensure([base, adapter])
    yield from ("| | seconds | modules | heavy ones |", "| --- | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory(dir=cache) as made:
        merge = [
            "--base", str(base.directory), "--adapter", str(adapter.directory), "--out", f"{made}/out", "--quiet",
        ]  # fmt: skip
        for name, words in {"--version": ["--version"], "--help": ["--help"], "a merge": merge}.items():
            one = started(*words)
            yield f"| {name} | {one.seconds:.2f} | {len(one.modules)} | {', '.join(one.heavy)} |"
        first, second = merged_twice(base.directory, adapter.directory, Path(made))
        yield f"| `lora_merge.merge`, first | {first:.2f} | | |"
        yield f"| `lora_merge.merge`, second | {second:.2f} | | |"


@click.command()
def command(cache_dir: Path) -> None:
    """Show what short commands import, and how long they take."""
    for line in lines_of(cache_dir.absolute()):
        click.echo(line)

"""What the numbers depend on, and whether there is room for more."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.measure import files_in

SPARE_BYTES = 2 * 10**9
"""Of memory for the libraries, of disk for everybody else."""

ROOT = Path(__file__).resolve().parents[2]


def lora_merge() -> list[str]:
    """Return how the command is started here."""
    script = Path(sys.executable).parent / "lora-merge"
    return [str(script)] if script.exists() else [sys.executable, "-m", "lora_merge"]


def machine(cache: Path) -> dict[str, Any]:
    """Return what the numbers depend on; nothing in it tells whose machine it is.

    Args:
        cache: where inputs and outputs are.
    """
    packages = ("torch", "transformers", "peft", "safetensors", "numpy")
    ours = subprocess.run([*lora_merge(), "--version"], check=True, capture_output=True, text=True)
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": total_memory(),
        "filesystem": filesystem_of(cache),
        "python": platform.python_version(),
        "lora-merge": ours.stdout.split()[-1],
        **{package: version(package) for package in packages},
    }


def machine_line(about: dict[str, Any]) -> str:
    """Return a machine in one sentence."""
    return (
        f"{about['cores']} cores of {about['cpu']}, {about['memory_bytes'] / 2**30:.0f} GiB of memory,"
        f" {about['filesystem']}, {about['system']}; Python {about['python']}, torch {about['torch']},"
        f" PEFT {about['peft']}, lora-merge {about['lora-merge']}"
    )


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """Return what the processor calls itself, or its architecture where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join(named[0].split()) if named else platform.processor() or platform.machine()


def filesystem_of(path: Path) -> str:
    """Return the type of the filesystem that a path is on, such as ext4."""
    mounts = Path("/proc/self/mounts")
    if not mounts.is_file():
        return "unknown filesystem"
    best, kind = "", "unknown filesystem"
    for line in mounts.read_text().splitlines():
        _, point, name, *_ = line.split()
        if path.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, name
    return kind


def nbytes_in(directory: Path) -> int:
    """Return the bytes of the files in a directory."""
    return sum(path.stat().st_size for path in files_in([directory]))


def total_memory() -> int:
    """Return the bytes of memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int:
    """Return the bytes of memory that a new process may fill: all of it where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return total_memory()


def shortage_of_disk(what: str, needed_bytes: float, directory: Path) -> str | None:
    """Return a sentence when a directory has no room for what is needed and some spare, else None."""
    free_bytes = shutil.disk_usage(directory).free
    if needed_bytes + SPARE_BYTES <= free_bytes:
        return None
    return (
        f"{what} needs {(needed_bytes + SPARE_BYTES) / 1e9:.1f} GB of disk for its inputs and outputs,"
        f" and {free_bytes / 1e9:.1f} GB are free"
    )


def shortage_of_memory(what: str, needed_bytes: float) -> str | None:
    """Return a sentence when the memory has no room for what is needed and some spare, else None."""
    free_bytes = available_memory()
    if needed_bytes + SPARE_BYTES <= free_bytes:
        return None
    return (
        f"{what} needs {(needed_bytes + SPARE_BYTES) / 1e9:.1f} GB of memory,"
        f" and {free_bytes / 1e9:.1f} GB are available"
    )

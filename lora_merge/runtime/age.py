"""How long this process has been running, the start of Python included."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

_IMPORTED = time.perf_counter()

_AT_MOST = 60.0
"""Seconds that Python may take until this module is imported. A system that says more means something else."""


def age() -> float:
    """Return the wall seconds since this process began: on Linux to a hundredth, elsewhere since this module was imported."""
    imported = time.perf_counter() - _IMPORTED
    if sys.platform != "linux":
        return imported
    try:
        # Field 22 of proc_pid_stat(5): ticks since the machine was started. The name in field 2 may have spaces in it.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        found = time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, ValueError, IndexError):
        return imported
    return found if imported <= found <= imported + _AT_MOST else imported

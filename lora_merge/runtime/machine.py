"""Cores and memory that this process may use, within the limits of its control groups."""

from __future__ import annotations

import contextlib
import os
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOT = Path("/")

_UNLIMITED = 1 << 60
"""Version 1 of control groups writes a number above this where there is no limit."""


def usable_cores(root: Path = _ROOT) -> int:
    """Return the number of cores that this process may use: its affinity, limited by the quota of its control groups.

    Args:
        root: where ``/proc`` and ``/sys`` are.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    n_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    for group in _groups(root, "cpu"):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if not period:
            quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
        # ``max`` (version 2) and -1 (version 1) mean no quota.
        if quota.isdecimal() and period.isdecimal() and int(period):
            n_cores = min(n_cores, ceil(int(quota) / int(period)))
    return max(1, n_cores)


def free_bytes(root: Path = _ROOT) -> int | None:
    """Return the bytes of memory that this process may still take; None where the platform does not say.

    What the page cache holds counts as free: the kernel gives it back.

    Args:
        root: where ``/proc`` and ``/sys`` are.
    """
    found = []
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            found.append(int(value.split()[0]) << 10)
    for group in _groups(root, "memory"):
        for limit_file, usage_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = _text(group / limit_file), _text(group / usage_file)
            if limit.isdecimal() and usage.isdecimal() and int(limit) < _UNLIMITED:
                found.append(max(0, int(limit) - int(usage) + _page_cache_bytes(group)))
    # The tightest limit counts: the machine's, or that of any group above.
    return min(found, default=None)


def _page_cache_bytes(group: Path) -> int:
    """Return the bytes of a control group's page cache that were not used lately; the kernel takes them back when
    needed.
    """
    for line in _text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in {"inactive_file", "total_inactive_file"} and value.isdecimal():
            return int(value)
    return 0


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the directories of the control groups of this process, from its own up to the root's: every one may have
    a limit.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        # Version 2 has one line with no names; version 1 a line for each controller.
        if names and controller not in names.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if names else "")
        own = Path(path.lstrip("/"))
        for part in (own, *own.parents):
            yield mount / part


def _text(path: Path) -> str:
    """Return a small file's text without white space around it; empty where it cannot be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8").strip()
    return ""

"""Decides which merges of one base are made in one pass, by memory and disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.errors import WriteError
from lora_merge.merging.budget import peak_together
from lora_merge.requests.sizes import parse_size
from lora_merge.runtime import machine
from lora_merge.words import size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.merging.preparing import Prepared

MOST_TOGETHER = 8
"""Most outputs of one pass over a base. Each keeps its factors in memory and its files open."""


def fit_together(merges: Sequence[Prepared]) -> bool:
    """Return True if one pass may make all of these merges: they are few enough, and their memory suffices.

    Outputs in stores are made one after the other: each of their files has one reader of the base.
    """
    if len(merges) > 1 and any(one.takes_files for one in merges):
        return False
    limits = [one.request.memory_limit for one in merges if one.request.memory_limit is not None]
    # The strictest limit of all jobs; without any, the memory that is free.
    limit = min(map(parse_size, limits), default=machine.free_bytes())
    peak = peak_together([one.budget for one in merges])
    return len(merges) <= MOST_TOGETHER and (limit is None or peak <= limit)


def shortage(merges: Sequence[Prepared]) -> WriteError | None:
    """Return an error if the disk has room for each output, but not for all of them; otherwise None."""
    # Each merge has checked its own need. Outputs on several disks are left to that.
    if len(merges) < 2 or len({_disk(Path(one.out)) for one in merges}) > 1:
        return None
    needed = sum(one.summary.disk_needed_bytes for one in merges)
    free = min(one.summary.disk_free_bytes for one in merges)
    if needed <= free:
        return None
    sentence = f"{Path(merges[0].out).parent}: {len(merges)} outputs need {size_text(needed)}, but their disk has only {size_text(free)} free"
    return WriteError(sentence, hint="free disk space, or write them to another disk")


def _disk(out: Path) -> int:
    """Return the device number of an output's disk, from the closest directory that exists."""
    existing = next(path for path in (out, *out.parents) if path.exists())
    return existing.stat().st_dev

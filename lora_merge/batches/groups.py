"""Which merges of one base one pass may make: as many as memory and the disk have room for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.errors import WriteError
from lora_merge.merging.budget import peak_together
from lora_merge.requests.sizes import parse_size
from lora_merge.runtime import machine

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_merge.merging.preparing import Prepared

MOST_TOGETHER = 8
"""Outputs of one pass over a base: each keeps its factors in memory, and its files open."""


def fit_together(merges: Sequence[Prepared]) -> bool:
    """Return True where one pass may make all of these: they are few enough, and memory is enough for them."""
    limits = [one.request.memory_limit for one in merges if one.request.memory_limit is not None]
    limit = min(map(parse_size, limits), default=machine.free_bytes())
    peak = peak_together(one.budget for one in merges)
    return len(merges) <= MOST_TOGETHER and (limit is None or peak <= limit)


def shortage(merges: Sequence[Prepared]) -> WriteError | None:
    """Return an error where the disk has room for each output, and not for all that are made together."""
    if len(merges) < 2 or len({_disk(one.out) for one in merges}) > 1:
        return None
    needed = sum(one.summary.disk_needed_bytes for one in merges)
    free = min(one.summary.disk_free_bytes for one in merges)
    if needed <= free:
        return None
    sentence = f"{merges[0].out.parent}: {len(merges)} outputs need {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free"
    return WriteError(sentence, hint="free some, or choose another place")


def _disk(out: Path) -> int:
    existing = next(path for path in (out, *out.parents) if path.exists())
    return existing.stat().st_dev

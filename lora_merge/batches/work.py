"""What a batch is about to do, for an observer: how many merges and conversions, and the bytes of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.merging.headline import Work
from lora_merge.merging.preparing import Prepared
from lora_merge.words import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.conversion.job import Conversion


def work_of(planned: Mapping[str, Prepared | Conversion], n_jobs: int, n_kept: int) -> Work:
    """Return what is about to be done.

    Args:
        planned: name → each job that will be carried out.
        n_jobs: of the batch.
        n_kept: jobs whose outputs are up to date.
    """
    merges = {name: one for name, one in planned.items() if isinstance(one, Prepared)}
    n_bases = len({one.planned.plan.base for one in merges.values()})
    n_conversions = len(planned) - len(merges)
    words = [f"{counted(len(merges), 'merge')} of {counted(n_bases, 'base')}"] if merges else []
    words += [counted(n_conversions, "conversion")] if n_conversions else []
    words += [f"{n_kept} up to date"] if n_kept else []
    n_bytes = {name: sum(step.nbytes for step in one.planned.plan.steps) for name, one in merges.items()}
    headline = ": ".join(filter(None, (counted(n_jobs, "job"), ", ".join(words))))
    return Work(headline, sum(n_bytes.values()), n_bytes)

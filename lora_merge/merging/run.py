"""request → plan → the checkpoint: a run, or several of one base in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.report import Observer, Report, Silence
from lora_merge.merging.preparing import Prepared, prepare
from lora_merge.merging.writing import write

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_merge.requests.request import Request


def run(request: Request, *, dry_run: bool = False, observer: Observer | None = None) -> Report:
    """Carry out one request.

    Args:
        request: what to merge.
        dry_run: stop after planning; nothing is written, and no output needs to be named.
        observer: hears of phases and bytes.

    Raises:
        LoraMergeError: see `lora_merge.errors`. Nothing stands under the output's name then, but what
            stood there before.
    """
    watch = observer or Silence()
    prepared = prepare(request, watch, dry_run=dry_run)
    if dry_run:
        return prepared.report()
    (done,) = carry_out([prepared], watch)
    if isinstance(done, Exception):
        raise done
    return done


def carry_out(group: Sequence[Prepared], watch: Observer) -> Iterator[Report | Exception]:
    """Make the outputs of some requests that have a base and a device in common, in one pass over the base.

    Yields:
        The report of each, or what it alone failed of, as soon as that is known.

    Raises:
        LoraMergeError: what all of them failed of.
    """
    smallest = min((one.budget for one in group), key=lambda budget: (budget.n_workers, budget.tile_elements))
    for one, made in zip(group, write(group, smallest, watch), strict=True):
        yield made.error or one.report(made)

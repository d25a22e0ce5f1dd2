"""request → plan → checkpoint: one run, or several outputs of one base in one pass."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge import executors
from lora_merge.core.report import Observer, Report, Silence
from lora_merge.errors import LoraMergeError
from lora_merge.merging.headline import Work, announce
from lora_merge.merging.preparing import Made, Prepared, prepare
from lora_merge.merging.pushing import placed, push_made
from lora_merge.merging.writing import write

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_merge.requests.request import Request


def run(
    request: Request, *, dry_run: bool = False, survival: bool = False, observer: Observer | None = None
) -> Report:
    """Carry out one request.

    Args:
        request: what to merge.
        dry_run: stop after planning; nothing is written, and no output needs to be named.
        survival: of a dry run, also look at a sample of what each rounding would keep (`Report.foreseen`).
        observer: hears of phases and bytes.

    Raises:
        LoraMergeError: see `lora_merge.errors`. No output was created, and what had the output's name before is
            untouched.
    """
    with executors.connections():
        return _run(placed(request), observer or Silence(), dry_run=dry_run, survival=survival)


def _run(request: Request, watch: Observer, *, dry_run: bool, survival: bool) -> Report:
    prepared = prepare(request, watch, dry_run=dry_run)
    if dry_run:
        report = prepared.report()
        if not survival:
            return report
        from lora_merge.merging.foreseeing import foresee

        return replace(report, foreseen=foresee(prepared.planned.plan, watch))
    if prepared.is_made:
        prepared.storage.clear_spent(prepared.wish)
        return prepared.report(Made(pushed=push_made(prepared.planned, prepared.out, watch)))
    announce(watch, Work(prepared.headline, sum(step.nbytes for step in prepared.planned.plan.steps)))
    (done,) = carry_out([prepared], watch)
    if isinstance(done, Exception):
        raise done
    return done


def carry_out(group: Sequence[Prepared], watch: Observer) -> Iterator[Report | Exception]:
    """Make the outputs of several requests in one pass over their base. All have the same base and the same device.

    Yields:
        The report of each, or the error that it alone failed with, as soon as that is known.

    Raises:
        LoraMergeError: an error that all of them failed with.
    """
    # One pass has one set of workers. The caller has formed the group so that it fits in memory
    # (`batches.groups`); tiles must suit the output with the least room.
    smallest = min((one.budget for one in group), key=lambda budget: (budget.n_workers, budget.tile_elements))
    for one, made in zip(group, write(group, smallest, watch), strict=True):
        yield made.error or _with_push(one, made, watch)


def _with_push(prepared: Prepared, made: Made, watch: Observer) -> Report | Exception:
    """Return the report of an output of this disk that is pushed too, or the error of the push: the output stays."""
    try:
        return prepared.report(
            replace(made, pushed=made.pushed or push_made(prepared.planned, prepared.out, watch))
        )
    except LoraMergeError as exc:
        return exc

"""``lora-merge batch``: many merges and conversions from one file."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_merge.cli import exits
from lora_merge.cli.help_pages import Verb
from lora_merge.cli.options import SETTINGS, console_of, options
from lora_merge.cli.reports import page_file
from lora_merge.cli.voice import say

if TYPE_CHECKING:
    from lora_merge.batches.event_log import EventLog
    from lora_merge.batches.reports import BatchReport


@click.command(cls=Verb, context_settings=SETTINGS)
@options("batch")
def batch(  # noqa: PLR0913 - options of the command alone, each by its name
    *,
    file: str,
    keep_going: bool,
    jobs: int,
    dry_run: bool,
    log_file: str | None,
    report: str | None,
    json: bool,
    quiet: bool,
    verbose: bool,
    **flags: Any,
) -> None:
    """Run many merges and conversions from one file.

    Plans all jobs, groups them by base, and runs each group in one pass over its base. Outputs that are up to date
    are skipped, so you can re-run the command to continue.

    \b
    A file:
      defaults: {base: Qwen/Qwen3-8B}
      jobs:
        - {adapter: runs/*/checkpoint-*, out: "merged/{1}-{2}"}
        - {convert: runs/style, for: vllm, rank: 16, out: "adapters/{adapter}-16"}

    \b
    Examples:
      lora-merge batch batch.yaml
      lora-merge batch batch.yaml --keep-going --log-file batch.jsonl --json
    """
    from lora_merge.batches.batch_file import read_batch
    from lora_merge.batches.event_log import EventLog
    from lora_merge.batches.run import Batch
    from lora_merge.cli.watching import watching_batch
    from lora_merge.reporting.subject import Subject

    console = console_of(json=json, quiet=quiet, verbose=verbose)
    # Options of the command line win over the file, so those that were not given must not count.
    given = {name: value for name, value in flags.items() if value is not None}
    listed = read_batch(file, given)
    log = EventLog(Path(log_file)) if log_file else None
    outs = tuple(job.request.out for job in listed)
    with page_file(report, Subject("batch", outs=outs), quiet=quiet) as page:
        is_interrupted = False
        with log or contextlib.nullcontext():
            try:
                with watching_batch([job.name for job in listed], log, quiet=quiet) as watch:
                    run = Batch(listed, watch, keep_going=keep_going, n_parallel=jobs, dry_run=dry_run)
                    run.run()
            except KeyboardInterrupt:
                is_interrupted = True
            finally:
                # After an interrupt too: the report says what is done and what is not.
                done = page.show(run.report(file))
                console.batch(done)
                if not (keep_going or is_interrupted or quiet) and done.count("not run"):
                    say("hint: --keep-going runs the other jobs too")
                if log:
                    _end(log, done)
        sys.exit(_exit_code(done, log, is_interrupted=is_interrupted))


def _exit_code(done: BatchReport, log: EventLog | None, *, is_interrupted: bool) -> int:
    """Say what went wrong beside the jobs themselves; return the exit code."""
    if log and log.failure:
        say(f"error: the log is not complete: {log.failure}")
    if is_interrupted:
        say("error: interrupted; finished jobs are kept, run the same command again to continue")
        return exits.INTERRUPTED
    return exits.BATCH if not done.ok else exits.WRITE if log and log.failure else exits.OK


def _end(log: EventLog, done: BatchReport) -> None:
    """Log the tracebacks of jobs that met a bug, then a last line with the result."""
    for job in done.jobs:
        if job.traceback:
            log.add("bug", name=job.name, traceback=job.traceback)
    log.add("end", ok=done.ok, seconds=done.seconds)

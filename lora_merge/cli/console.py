"""What a run looks like: progress and tables on stderr, data on stdout."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from lora_merge.cli.issues import say_issues
from lora_merge.cli.next_steps import after_conversion, after_merge, command, say_next, serving
from lora_merge.cli.plans import merge_lines, print_plan, print_profile
from lora_merge.cli.program import seconds_until_now
from lora_merge.cli.progress import watching
from lora_merge.cli.proofs import print_proof, say_failed
from lora_merge.cli.tables import done_text, print_batch, print_conversion, print_inspection
from lora_merge.cli.voice import say, say_raw, show, show_data
from lora_merge.reporting.data import batch_data, conversion_data, inspection_data, proof_data, result_data

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from lora_merge.batches.reports import BatchReport
    from lora_merge.conversion.lora import ConvertReport
    from lora_merge.core.report import Issue, Observer, Proof, Report
    from lora_merge.inspection.facts import Inspection
    from lora_merge.planning.explanation import Match


class Console:
    """Prints the progress, the results and the issues of one command.

    Args:
        as_json: print the result as data on stdout.
        quiet: print errors only.
        verbose: name every tensor, and time each phase.
        profile: print where each second went.
    """

    def __init__(self, *, as_json: bool, quiet: bool, verbose: bool, profile: bool = False) -> None:
        self._as_json, self._quiet, self._verbose, self._profile = as_json, quiet, verbose, profile
        self._start = seconds_until_now()

    def watching(self) -> AbstractContextManager[Observer]:
        """Yield an observer that draws a progress bar on a terminal, and prints plain lines elsewhere."""
        return watching(quiet=self._quiet, verbose=self._verbose)

    def report(self, report: Report, named: Mapping[str, str], again: str = "") -> None:
        """Print the result of a merge, or its plan after a dry run; then what to do next.

        Args:
            report: on the merge.
            named: ``base`` and ``out`` as the user named them, where they did.
            again: after a dry run: the command that merges; empty where it is not known.
        """
        # A plan comes before what is said of it, a finished merge after.
        if not self._quiet and (self._as_json or not report.dry_run):
            from lora_merge.merging.preparing import NO_GPU

            # Printed before the merge began.
            said = "" if report.dry_run else NO_GPU
            self._issues([issue for issue in report.issues if issue.code != said])
        out = named.get("out") or report.out
        if self._as_json:
            show_data(result_data(report))
        elif report.dry_run:
            print_plan(report, named, verbose=self._verbose)
            self._issues(report.issues)
        elif not self._quiet:
            for line in merge_lines(report, out):
                say(line)
        self._time(report.seconds)
        if self._profile:
            print_profile(report, self._start, seconds_until_now())
        if self._as_json or self._quiet:
            return
        if report.part:
            return
        if not report.dry_run:
            after_merge(out, is_verified=report.verdict.level != "none")
        elif again:
            say_next("merge it", again)

    def _time(self, seconds: Mapping[str, float]) -> None:
        """Print the seconds of each phase, with ``--verbose``."""
        if self._verbose and not self._quiet:
            say(f"time: {', '.join(f'{part} {took:.2f} s' for part, took in seconds.items())}")

    def proof(self, proof: Proof, out: str, *, failed: bool) -> None:
        """Print a line for each check, and what differs.

        Args:
            proof: what was found.
            out: the output, as the user named it.
            failed: True also for warnings under ``--strict``.
        """
        if self._as_json:
            show_data({"ok": not failed, **proof_data(proof)})
            return
        if self._quiet:
            if failed:
                say_failed(proof, out)
            return
        print_proof(proof, failed=failed, verbose=self._verbose)
        self._time(proof.seconds)
        if not failed and (found := serving(out)):
            say_next(*found)

    def inspection(self, found: Inspection, *, full: bool) -> None:
        """Print an adapter's description and its issues, then how to merge it. ``full`` lists every module."""
        if self._as_json:
            ok = not any(issue.severity == "error" for issue in found.issues)
            show_data({"ok": ok, **inspection_data(found)})
        elif not self._quiet:
            print_inspection(found, full=full)
        self._issues(found.issues)
        if not (self._as_json or self._quiet) and all(issue.severity != "error" for issue in found.issues):
            base = ("--base", found.base) if found.base else ()
            say_next("merge it", command("lora-merge", *base, "--adapter", found.adapter, "--out", "merged"))

    def conversion(self, report: ConvertReport, out: str, base: str, engine: str | None = None) -> None:
        """Print the result of a conversion or an extraction, then how to use it.

        Args:
            report: on the conversion.
            out: the output, as the user named it.
            base: of the adapter, as the user or the adapter names it; empty where neither does.
            engine: that it was made for.
        """
        self._issues(report.issues)
        if self._as_json:
            show_data({"ok": True, **conversion_data(report)})
        elif not self._quiet:
            print_conversion(report, verbose=self._verbose)
            say(done_text(report, out or report.out))
            if report.pushed:
                say(f"on the Hub: {report.pushed}")
            after_conversion(report, out or report.out.removeprefix("hf://"), base, engine)

    def batch(self, report: BatchReport) -> None:
        """Print a table of all jobs, and what went wrong; tracebacks of bugs with ``--verbose``."""
        if self._as_json:
            show_data(batch_data(report))
        if not self._quiet or not report.ok:
            print_batch(report, only_failed=self._quiet or self._as_json)
        for job in report.jobs if self._verbose else ():
            if job.traceback:
                say(f"{job.name}: the traceback of its bug")
                for line in job.traceback.rstrip("\n").split("\n"):
                    say_raw(f"  {line}")

    def _issues(self, issues: Sequence[Issue]) -> None:
        """Print issues: similar ones together unless verbose, errors only if quiet."""
        said = [issue for issue in issues if issue.severity == "error" or not self._quiet]
        say_issues(said, each=self._verbose)

    def matches(self, matches: tuple[Match, ...]) -> None:
        """Print how modules were matched (``plan --explain``)."""
        if self._as_json:
            show_data({"ok": True, "matches": [asdict(match) for match in matches]})
        else:
            show("\n\n".join(match.text() for match in matches))

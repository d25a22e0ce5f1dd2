"""Results as data: what ``--json`` prints, and what a page carries: the fields of reports, and their computed properties."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lora_merge.core.report import Report
from lora_merge.redaction import without_secrets
from lora_merge.words import counted

if TYPE_CHECKING:
    from lora_merge.batches.reports import BatchReport, JobReport
    from lora_merge.conversion.lora import ConvertReport, Loss
    from lora_merge.core.report import Proof
    from lora_merge.inspection.facts import Inspection

MOST_BYTES = 1_000_000
"""Most bytes of data that a page carries. With more, what is said of each tensor is left out."""


def _loss_data(loss: Loss | None) -> dict[str, float] | None:
    """Return a loss with its computed ``relative`` and ``energy``; None if nothing was lost."""
    return None if loss is None else {**asdict(loss), "relative": loss.relative, "energy": loss.energy}


def conversion_data(report: ConvertReport) -> dict[str, Any]:
    """Return a conversion's report, with the loss of each module and of all together."""
    data = asdict(report)
    losses = [_loss_data(one.loss) for one in report.modules]
    data["modules"] = [{**one, "loss": loss} for one, loss in zip(data["modules"], losses, strict=True)]
    return {**data, "loss": _loss_data(report.loss)}


def job_data(job: JobReport) -> dict[str, Any] | None:
    """Return the report of a batch's job as its own command prints it; None if it has none."""
    match job.report:
        case None:
            return None
        case Report() as report:
            return asdict(report)
        case report:
            return conversion_data(report)


def inspection_data(found: Inspection) -> dict[str, Any]:
    """Return an inspection, with each engine's verdict and each module's ‖Δ‖/‖W‖."""
    data = asdict(found)
    data["engines"] = [{**asdict(one), "verdict": one.verdict} for one in found.engines]
    data["modules"] = [{**asdict(one), "relative": one.relative} for one in found.modules]
    return data


_OF_THE_PLAN = ("placed", "untouched", "finite", "recompute")
"""Checks of an existing output that need the merge planned again, from base and adapter."""


def not_run(proof: Proof) -> tuple[str, ...]:
    """Return the names of the checks that could not run, because base, adapter or manifest is missing."""
    skipped = [finding.check for finding in proof.findings if not finding.asked]
    return (*skipped, *(_OF_THE_PLAN if "planned" in skipped else ()))


def not_run_words(proof: Proof) -> str:
    """Return which checks could not run, in words; empty if all could."""
    names = not_run(proof)
    return f"{counted(len(names), 'check')} could not run: {', '.join(names)}" if names else ""


def proof_data(proof: Proof) -> dict[str, Any]:
    """Return a proof, with the state of each check and comparison."""
    data = asdict(proof)
    data["findings"] = [{**asdict(finding), "state": finding.state} for finding in proof.findings]
    data["comparisons"] = [{**asdict(one), "ok": one.ok} for one in proof.comparisons]
    return {**data, "checked": proof.checked, "not_checked": proof.not_checked, "not_run": not_run(proof)}


def batch_data(report: BatchReport) -> dict[str, Any]:
    """Return the report on a batch, with the report of each job as its own command prints it."""
    jobs = [{**asdict(job), "report": job_data(job)} for job in report.jobs]
    return {"ok": report.ok, **asdict(report), "jobs": jobs}


def result_data(report: Report) -> dict[str, Any]:
    """Return a merge's report, as ``--json`` prints it."""
    return {"ok": True, **asdict(report)}


def embedded(data: Any) -> str:
    """Return data as JSON that can be in the middle of a page: nothing in it ends a script, and no number is beyond JSON.

    Where it is too large for a page, what it says of each tensor is emptied; if that is not enough, the reports of jobs and
    the lists of issues too. ``left_out`` then has the number of entries under each emptied key.
    """
    text = _json(data)
    for keys in _CUTS:
        if len(text) <= MOST_BYTES:
            break
        left_out: dict[str, int] = {}
        text = _json({**_without(keys, data, left_out), "left_out": left_out})
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _json(data: Any) -> str:
    # In ASCII everything that could control a terminal or end a line is an escape already, but for DEL.
    text = json.dumps(_finite(data), separators=(",", ":"), default=str)
    return without_secrets(text).replace("\x7f", "\\u007f")


def _finite(value: Any) -> Any:
    """Return a value with texts in place of numbers that JSON has not: infinity and NaN."""
    match value:
        case float():
            return value if math.isfinite(value) else str(value)
        case dict():
            return {str(key): _finite(one) for key, one in value.items()}
        case list() | tuple():
            return [_finite(one) for one in value]
    return value


_OF_TENSORS = frozenset({"survival", "modules", "module_ranks", "tensors"})
_CUTS = (
    _OF_TENSORS,
    _OF_TENSORS | {"report", "issues", "comparisons", "engines"},
    _OF_TENSORS | {"report", "issues", "comparisons", "engines", "jobs", "findings"},
)
"""What is left out of a page that would be too large: one after the other, until it fits."""


def _without(keys: frozenset[str], value: Any, left_out: dict[str, int]) -> Any:
    """Return data with empty values under some keys, and count their entries in `left_out`."""
    if isinstance(value, list | tuple):
        return [_without(keys, one, left_out) for one in value]
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for key, one in value.items():
        is_cut = key in keys and isinstance(one, dict | list | tuple)
        if is_cut:
            left_out[key] = left_out.get(key, 0) + len(one)
        found[key] = type(one)() if is_cut else _without(keys, one, left_out)
    return found

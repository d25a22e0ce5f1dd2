"""Results as data for ``--json``: the fields of reports, and their computed properties."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lora_merge.core.report import Report

if TYPE_CHECKING:
    from lora_merge.batches.reports import JobReport
    from lora_merge.conversion.lora import ConvertReport, Loss
    from lora_merge.core.report import Issue, Proof
    from lora_merge.inspection.facts import Inspection


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


def proof_data(proof: Proof) -> dict[str, Any]:
    """Return a proof, with the state of each check and comparison."""
    data = asdict(proof)
    data["findings"] = [{**asdict(finding), "state": finding.state} for finding in proof.findings]
    data["comparisons"] = [{**asdict(one), "ok": one.ok} for one in proof.comparisons]
    return {**data, "checked": proof.checked, "not_checked": proof.not_checked}


def error_data(error: BaseException, sentence: str, code: int, hints: list[str]) -> dict[str, Any]:
    """Return an error with all its issues."""
    issues: tuple[Issue, ...] = getattr(error, "issues", ())
    verdict = getattr(error, "verdict", None)
    return {
        "ok": False,
        "error": type(error).__name__,
        "exit_code": code,
        "message": sentence,
        "hint": "; ".join(hints),
        "issues": [asdict(issue) for issue in (verdict.issues if verdict else issues)],
    }

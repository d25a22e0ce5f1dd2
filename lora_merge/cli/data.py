"""Errors as data for ``--json``; results are data in `lora_merge.reporting.data`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_merge.core.report import Issue


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

"""The page of a run that failed: every error, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from lora_merge._version import __version__
from lora_merge.core.report import error as error_issue
from lora_merge.reporting.blocks import notices
from lora_merge.reporting.page import Command, Fact, Facts, Page, Table, section, sections
from lora_merge.words import counted

if TYPE_CHECKING:
    from lora_merge.core.report import Issue
    from lora_merge.errors import LoraMergeError
    from lora_merge.reporting.subject import Subject


_TITLES = {"merge": "Merge", "verify": "Verification", "inspect": "Adapter", "batch": "Batch"}


def failure_page(error: LoraMergeError, subject: Subject) -> Page:
    """Return the page of a run that ended with an error."""
    issues = issues_of(error)
    n = sum(issue.severity == "error" for issue in issues)
    what = " + ".join(filter(None, (subject.base or "base of the adapter", *subject.adapters)))
    nothing = " No output was created." if subject.verb in {"merge", "batch"} else ""
    return Page(
        kind=_TITLES[subject.verb],
        headline=what if subject.verb == "merge" else ", ".join(subject.outs or subject.adapters),
        state="bad",
        verdict=f"{_TITLES[subject.verb]} failed: {counted(n, 'error')}.{nothing}",
        figures=(Fact("errors", str(n)),),
        sections=sections(
            section("messages", "Messages", notices(issues)),
            section("asked", "What was asked for", Facts(tuple(_asked(subject)))),
            section("details", "Each error", _each(issues)),
            section("provenance", "Provenance", Facts((Fact("lora-merge", __version__),))),
            section("command", "Command", Command(subject.command) if subject.command else None),
        ),
        data={
            "ok": False,
            "error": type(error).__name__,
            "message": str(error),
            "hint": getattr(error, "hint", ""),
            "issues": [asdict(issue) for issue in issues],
        },
    )


def issues_of(error: LoraMergeError) -> tuple[Issue, ...]:
    """Return the issues of an error; of one without any, itself as an issue."""
    verdict = getattr(error, "verdict", None)
    issues: tuple[Issue, ...] = verdict.issues if verdict else getattr(error, "issues", ())
    if issues:
        return issues
    hints = (getattr(error, "hint", ""), *getattr(error, "__notes__", ()))
    return (error_issue(type(error).__name__, "", str(error), "; ".join(filter(None, hints))),)


def _asked(subject: Subject) -> list[Fact]:
    return [
        Fact("base", subject.base or "the one that the adapter names", is_code=bool(subject.base)),
        *(Fact("adapter", one, is_code=True) for one in subject.adapters),
        *(Fact("output", one, is_code=True) for one in subject.outs[:20]),
    ]


def _each(issues: tuple[Issue, ...]) -> Table | None:
    """Return a table of single errors, where the messages show groups; None for a few."""
    rows = tuple((one.subject, one.sentence) for one in issues[:500])
    shown = Table("Errors", ("Where", "What"), rows, code=frozenset({0}), is_titled=True)
    return shown if len(rows) > 3 else None

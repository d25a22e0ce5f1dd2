"""Can an engine load all of the output, and read nothing wrongly?"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.checks.gate import RULES, SLOW
from lora_merge.formats.written_checkpoint import read_output
from lora_merge.storage.digests import same_bytes
from lora_merge.storage.local_copies import in_store, local_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lora_merge.checks.evidence import Evidence
    from lora_merge.core.report import Issue, Severity
    from lora_merge.formats.written_checkpoint import Output

_MILDER: dict[Severity, Severity] = {"error": "warning", "warning": "note"}


def loadable(evidence: Evidence) -> Iterator[Issue]:
    """Yield the gate's findings; one severity lower where the base has the same fault.

    A base that names no architecture, say, is merged as it is: its owner knows how it is loaded.
    """
    base = local_path(evidence.plan.base)
    found = [issue for issue in gate(evidence.output) if not _came_along(issue, evidence.root, base)]
    if not found:
        return
    # The base is read only when there is something to compare.
    own = {(issue.code, issue.subject) for issue in gate(read_output(base, *in_store(evidence.plan.base)))}
    for issue in found:
        if (issue.code, issue.subject) not in own:
            yield issue
        elif issue.severity in _MILDER:
            sentence = f"{issue.sentence}; the base has the same fault"
            yield replace(issue, severity=_MILDER[issue.severity], sentence=sentence)


def _came_along(issue: Issue, root: Path, base: Path) -> bool:
    """Return True for a note about a file that is the base's own, byte for byte. The base need not be checked for it."""
    here, there = root / issue.subject, base / issue.subject
    return issue.severity == "note" and here.is_file() and there.is_file() and same_bytes(here, there)


def gate(output: Output) -> list[Issue]:
    """Return the findings of the gate's rules in a directory; slow ones only where transformers is imported already."""
    # Loading transformers can take as long as a merge.
    rules = [rule for name, rule in RULES.items() if name not in SLOW or "transformers" in sys.modules]
    return [issue for rule in rules for issue in rule(output)]

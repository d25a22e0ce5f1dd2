"""Do the bytes on disk have the digests that writing recorded?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.core.plan import Copy
from lora_merge.core.report import error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.checks.evidence import Evidence
    from lora_merge.core.report import Issue


def untouched(evidence: Evidence) -> Iterator[Issue]:
    """Yield an issue for each tensor whose bytes are not the recorded ones.

    A copy's record is the digest of its *source*, so equality means byte-identical to the base. At level
    ``full`` merged tensors are read back too.
    """
    recorded = {record.name: record.digest for record in evidence.records}
    for step in evidence.plan.steps:
        is_copy = isinstance(step.op, Copy)
        if not is_copy and evidence.level != "full":
            continue
        for slot in step.slots:
            found = evidence.digest(replace(slot, file=str(evidence.root / slot.file)))
            if found != recorded.get(slot.name):
                what = "differs from the base" if is_copy else "is not what was written"
                yield error("wrong-digest", slot.name, f"{what}: {found}, expected {recorded.get(slot.name)}")

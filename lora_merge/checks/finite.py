"""Is every merged value finite in the dtype that it is stored in?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.report import error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.checks.evidence import Evidence
    from lora_merge.core.report import Issue


_OTHER_DTYPE = "pass --dtype float32 or bfloat16, which have a larger range"
_CHECK = "check the values of the adapter's factors, and its scaling: the change is too large"


def finite(evidence: Evidence) -> Iterator[Issue]:
    """Yield an issue for each merged tensor whose record says that it has NaN or infinity."""
    slots = {slot.name: slot for step in evidence.plan.steps for slot in step.slots}
    for record in evidence.records:
        # The merge has looked at every value while it was in the cache.
        if not record.finite:
            dtype = slots[record.name].dtype
            sentence = f"holds NaN or infinite values after the merge ({dtype})"
            # Only F16 has a smaller range than float32; BF16 has the same exponents.
            yield error("non-finite", record.name, sentence, _OTHER_DTYPE if dtype == "F16" else _CHECK)

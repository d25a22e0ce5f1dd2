"""A look at every value of an adapter's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_merge.core.report import Issue, error
from lora_merge.io.safetensors import blocks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_merge.core.tensor import TensorRef

_NON_FINITE_BITS: Mapping[str, tuple[str, int]] = {
    "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000),
}  # fmt: skip
"""Storage type and exponent mask: a value with every exponent bit set is NaN or infinite."""


def non_finite(refs: Iterable[TensorRef]) -> list[Issue]:
    """Return an issue for each tensor that holds NaN or infinity. Reads every value once."""
    import numpy as np

    issues = []
    for ref in refs:
        if ref.dtype not in _NON_FINITE_BITS:
            continue
        storage, mask = _NON_FINITE_BITS[ref.dtype]
        count = sum(
            int(np.count_nonzero((np.frombuffer(block, storage) & mask) == mask)) for block in blocks(ref)
        )
        if count:
            sentence = f"holds {count} values that are NaN or infinite"
            issues.append(
                error("non-finite", ref.name, sentence, "the training diverged; use an earlier checkpoint")
            )
    return issues

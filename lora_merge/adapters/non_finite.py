"""NaN and infinite values in an adapter's tensors, and tensors that should be equal and are not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.core.report import Issue, error
from lora_merge.formats.safetensors import blocks, same_values
from lora_merge.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_merge.adapters.tensor_names import Repeat
    from lora_merge.core.tensor import TensorRef

_NON_FINITE_BITS: Mapping[str, tuple[str, int]] = {
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F32": ("<u4", 0x7F800000),
}
"""Storage type and exponent mask: a value with every exponent bit set is NaN or infinite."""


def non_finite(refs: Iterable[TensorRef]) -> list[Issue]:
    """Return an issue for each tensor that holds NaN or infinity. Reads every value once, or twice where one does."""
    issues = []
    for run in _runs(refs):
        first, last = run[0], run[-1]
        # Neighbours in the file are read in one go. Which of them it is, is asked only where one is bad.
        if not _count(replace(first, nbytes=last.end - first.start)):
            continue
        for ref in run:
            count = _count(ref)
            if count:
                sentence = f"has {counted(count, 'NaN or infinite value')}"
                hint = "use an earlier checkpoint: the training diverged"
                issues.append(error("non-finite", ref.name, sentence, hint))
    return issues


def unequal(repeats: Iterable[Repeat]) -> list[Issue]:
    """Return an issue for each pair of tensors that are one parameter and have different values. Reads both."""
    hint = "keep the tensor that was trained last (PEFT saves equal copies)"
    return [
        error(
            "duplicate-tensor",
            other.name,
            f"is a second {what} of its module, and differs from {one.name}",
            hint,
        )
        for one, other, what in repeats
        # Where dtypes differ, the second is rounded to the first's, so both orders are asked.
        if not (same_values(one, other) or same_values(other, one))
    ]


def _count(ref: TensorRef) -> int:
    """Return how many values of a tensor are NaN or infinite, block by block."""
    import numpy as np

    storage, mask = _NON_FINITE_BITS[ref.dtype]
    return sum(int(np.count_nonzero((np.frombuffer(block, storage) & mask) == mask)) for block in blocks(ref))


def _runs(refs: Iterable[TensorRef]) -> list[list[TensorRef]]:
    """Return the tensors in runs that are contiguous in one file and have one dtype; other dtypes are left out."""
    runs: list[list[TensorRef]] = []
    for ref in sorted(refs, key=lambda ref: (ref.file, ref.start)):
        if ref.dtype not in _NON_FINITE_BITS:
            continue
        before = runs[-1][-1] if runs else None
        if before is not None and (before.file, before.end, before.dtype) == (ref.file, ref.start, ref.dtype):
            runs[-1].append(ref)
        else:
            runs.append([ref])
    return runs

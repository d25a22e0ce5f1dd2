"""Rows of floating-point tensors, read without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.checks.contents import content_of
from lora_merge.storage.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from lora_merge.core.tensor import TensorRef
    from lora_merge.storage.sources import Source

    Numbers = np.ndarray[Any, np.dtype[np.float32]]


def floats_of(ref: TensorRef) -> Numbers:
    """Return a whole floating-point tensor without torch: float32, a row for each entry of its first axis.

    Raises:
        CheckpointError: the file cannot be read.
    """
    with open_source(ref.file) as source:
        found = floats_at(source, ref.start, ref.nbytes // ref.shape[0], range(ref.shape[0]), ref.dtype)
    assert found is not None, f"{ref.name} has the dtype {ref.dtype}"
    return found


def floats_at(source: Source, start: int, n_bytes: int, rows: Sequence[int], dtype: str) -> Numbers | None:
    """Return rows of ``n_bytes`` each as float32; None where their dtype is none of those that merge."""
    return numbers_in(content_of(source, start, n_bytes, rows), dtype, len(rows))


def numbers_in(content: bytearray, dtype: str, n_rows: int) -> Numbers | None:
    """Return the bytes of some rows as float32, as `floats_at` does."""
    import numpy as np

    match dtype:
        case "BF16":  # the upper half of a float32
            found = (np.frombuffer(content, "<u2").astype("<u4") << 16).view(np.float32)
        case "F16":
            found = np.frombuffer(content, "<f2").astype(np.float32)
        case "F32":
            found = np.frombuffer(content, "<f4")
        case _:
            return None
    return found.reshape(n_rows, -1)

"""Stored floating-point numbers as float32, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Numbers = np.ndarray[Any, np.dtype[np.float32]]


def host_floats(content: bytearray | memoryview, dtype: str) -> Numbers:
    """Return numbers as float32, which is exact, one-dimensional.

    Args:
        content: their bytes.
        dtype: ``"F32"``, ``"BF16"`` or ``"F16"``.
    """
    import numpy as np

    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(content, "<u2").astype("<u4") << 16).view(np.float32)
    stored = np.frombuffer(content, {"F32": "<f4", "F16": "<f2"}[dtype])
    return stored.astype(np.float32, copy=False)

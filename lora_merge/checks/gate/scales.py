"""Are the scales of quantised weights numbers that an engine can multiply by? Only some of a large tensor are read."""

from __future__ import annotations

import contextlib
from functools import cache
from typing import TYPE_CHECKING

from lora_merge.checks.decoding.by_code import numbers_of
from lora_merge.checks.gate.parts import grouped
from lora_merge.core.report import error
from lora_merge.core.tensor import DTYPE_BITS, TORCH_NAMES
from lora_merge.errors import CheckpointError
from lora_merge.storage.reading import read_unwatched
from lora_merge.storage.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lora_merge.checks.decoding.by_code import Wide
    from lora_merge.core.report import Issue
    from lora_merge.core.tensor import TensorRef
    from lora_merge.formats.written_checkpoint import Output
    from lora_merge.storage.sources import Source

_READ = 1 << 16
"""Bytes of each tensor that are looked at, from its first."""

_BYTES = {"F8_E4M3": "F8_E4M3", "F8_E8M0": "F8_E8M0", "U8": "F8_E8M0"}
"""Dtype → what its bytes mean as scales: MX formats store powers of two as plain bytes."""

_POSITIVE = (".weight_scale", ".weight_scale_inv", "._weight_scale", "_scales", ".SCB", ".absmax")
"""Ends of names of scales that are made from sizes. Those of GPTQ, AWQ and MLX may be negative."""


def scales(output: Output) -> Iterator[Issue]:
    """Yield an issue for each scale that is not finite, that is negative where none can be, or that is zero for a whole weight."""
    with contextlib.ExitStack() as stack:
        # Once, though each file may have thousands of scales.
        opened = cache(lambda file: stack.enter_context(open_source(file)))
        for module in grouped(output.tensors()).values():
            found = [(module.shared, True), (module.scales, False)]
            for ref, is_shared in found if module.codes is not None else ():
                if ref is not None and (why := _wrong(ref, opened, is_shared=is_shared)):
                    hint = "quantise the weight again, or download the file again: engines multiply its codes by that"
                    yield error("bad-scale", ref.name, why, hint)


def _wrong(ref: TensorRef, opened: Callable[[str], Source], *, is_shared: bool) -> str:
    """Return what is wrong with a tensor of scales; empty for nothing that is seen."""
    import numpy as np

    # Scales of bitsandbytes may be codes of a table.
    if ref.dtype not in TORCH_NAMES and (ref.dtype not in _BYTES or ref.name.endswith(".absmax")):
        return ""
    values = _values(ref, opened)
    if values is None or not values.size:
        return ""
    if not np.isfinite(values).all():
        return "holds NaN or infinity, expected finite scales"
    lowest = float(values.min())
    if is_shared and not lowest > 0:
        return f"is {lowest:g}, expected a positive scale for the whole weight"
    if ref.name.endswith(_POSITIVE) and lowest < 0:
        return f"holds {lowest:g}, expected no negative scale"
    return ""


def _values(ref: TensorRef, opened: Callable[[str], Source]) -> Wide | None:
    """Return the first values of a tensor; None where its file cannot be read, which another rule says."""
    size = DTYPE_BITS[ref.dtype] // 8
    content = bytearray(min(ref.nbytes, _READ) // size * size)
    try:
        read_unwatched(opened(ref.file), memoryview(content), ref.start)
    except CheckpointError:
        return None
    return numbers_of(content, ref.dtype, 1, _BYTES.get(ref.dtype, ""))

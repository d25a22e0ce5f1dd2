"""How long a merge will take, and how much it will read: an estimate from the plan, as a range.

The costs are those of docs/performance.md, for one core of a machine of 2026. The range is wide because disks are: the same
`cp -r` of 3 GB took from 1 to 8 seconds there. What a plan decides (bytes, values, ranks, how changes are combined) is
counted exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.core.plan import Merge
from lora_merge.merging.worker import needs_torch
from lora_merge.native.library import library

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.facts import Facts
    from lora_merge.core.plan import MergePlan
    from lora_merge.core.tensor import TensorRef

_STARTING = (0.4, 1.5)
"""Seconds until the first byte is read, and those after the last: start-up, planning, checks."""

_LOADING = (0.3, 1.5)
"""Seconds that loading torch adds, where it is needed. Copies and some merges go on meanwhile."""

_FAST, _SLOW = 2.5e9, 3e8
"""Bytes per second that a disk reads or writes: a fast NVMe disk or the page cache, and a slow one."""

_SLOWER = 2.5
"""How much longer the arithmetic may take on a slow or a busy processor."""

_NEAREST_NS = 1.5
"""Nanoseconds of one core per value that is read, widened, rounded to the nearest and written."""

_FLOPS = 3e10
"""Floating-point operations per second of one core, in the products of factors."""

_ROUNDING_NS: Mapping[str, float] = {"adapter": 7.5, "stochastic": 4.5}
_DECODING_NS = 1.0
_ENCODING_NS: Mapping[str, float] = {"scaled": 4.5, "packed_int": 4.5, "fp4": 8.0}
_OTHER_ENCODING_NS = 8.0
"""Nanoseconds of one core per value, beside `_NEAREST_NS`: to round for an adapter, to decode, and to encode by codec."""

_COMPILED_NS = {"rounding": 2.0, "decoding": 0.4, "encoding": 1.0}
"""The same with compiled loops: for an adapter; to decode; to encode on the stored scales."""

_LOOKING_BACK_NS, _PEFT_LAYER_NS = 2.0, 5.0
"""The same for a change that looks at the whole weight first, and for one that PEFT's own layer makes."""

_COMBINING_NS: Mapping[str, float] = {"ties": 100.0, "dare_linear": 10.0, "dare_ties": 25.0}
"""The same for a combination, per adapter. TIES looks for the largest values of each change."""

_SVD_NS = 0.37
"""Nanoseconds of one core for a singular value decomposition, per rows x columns x the smaller of the two."""

_FULL_NS = 12.0
"""Nanoseconds per merged value to recompute it in float64, for ``--verify full``."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a merge will take, about."""

    read_bytes: int
    """Bytes of base and adapters that are read; each tensor once."""

    written_bytes: int
    """Bytes of the output. Files that are linked or cloned need fewer."""

    seconds: tuple[float, float]
    """The least and the most that is likely."""


def estimate(plan: MergePlan, n_workers: int, *, is_full: bool = False) -> Estimate:
    """Return what a merge will take on a CPU.

    Args:
        plan: what is to be done.
        n_workers: threads or processes that share the work.
        is_full: True with ``--verify full``, which reads the output again and recomputes all of it.
    """
    read_bytes = sum(ref.nbytes for ref in _inputs(plan).values())
    written = plan.disk_bytes()
    merges = [step.op for step in plan.steps if isinstance(step.op, Merge)]
    ns = [_merge_ns(op) + is_full * _FULL_NS * math.prod(op.source.shape) for op in merges]
    # The last worker may be left with the largest tensor while the others have nothing to do.
    computing = max(sum(ns) / max(1, n_workers), max(ns, default=0.0)) * 1e-9
    moved = read_bytes + written * (2 if is_full else 1)
    # At best the disk works while the processor does; at worst one waits for the other.
    is_loaded = needs_torch(plan.steps)
    least, most = (start + is_loaded * load for start, load in zip(_STARTING, _LOADING, strict=True))
    low = least + max(computing, moved / _FAST)
    high = most + _SLOWER * computing + moved / _SLOW
    return Estimate(read_bytes, written, (low, high))


def occupied_workers(plan: MergePlan) -> int:
    """Return how many cores the arithmetic of a plan occupies while a fast disk reads and writes its bytes."""
    moved = moved_bytes(plan)
    return math.ceil(sum(arithmetic_ns(plan).values()) * 1e-9 / (moved / _FAST)) if moved else 1


def moved_bytes(plan: MergePlan) -> int:
    """Return the bytes that are read, each tensor once, and written."""
    return sum(ref.nbytes for ref in _inputs(plan).values()) + plan.disk_bytes()


def arithmetic_ns(plan: MergePlan) -> dict[str, float]:
    """Return the nanoseconds of one core that merging takes, by what takes most of them: a combination (``"ties"``), a
    rounding (``"adapter"``), a codec that encodes; or an empty text, where it is mostly reading and writing.
    """
    found: dict[str, float] = {}
    for step in plan.steps:
        if isinstance(op := step.op, Merge):
            kind = _kind(op)
            found[kind] = found.get(kind, 0.0) + _merge_ns(op)
    return found


def _kind(op: Merge) -> str:
    if op.combination is not None:
        return op.combination.method
    if op.rounding is not None:
        return op.rounding.method
    return "" if op.target.is_dense else op.target.codec


def _inputs(plan: MergePlan) -> dict[tuple[str, int, int], TensorRef]:
    """Return every stored tensor that is read, once: parts of weights and factors."""
    refs = [ref for step in plan.steps for ref in step.reads.values()]
    refs += [
        ref
        for step in plan.steps
        if isinstance(step.op, Merge)
        for delta in step.op.deltas
        for ref in delta.factors.values()
    ]
    return {(ref.file, ref.start, ref.nbytes): ref for ref in refs}


def _merge_ns(op: Merge) -> float:
    """Return the nanoseconds of one core that a weight takes."""
    n_values = math.prod(op.source.shape)
    each = _NEAREST_NS + _storing_ns(op)
    each += sum(_passing_ns(delta.facts) for delta in op.deltas)
    combining = 0.0
    if op.combination is not None:
        each += len(op.deltas) * _COMBINING_NS.get(op.combination.method, 0.0)
        if op.combination.method == "svd":
            *blocks, rows, columns = (
                (1, *op.source.shape)[-3:] if len(op.source.shape) > 1 else (1, 1, n_values)
            )
            combining = _SVD_NS * math.prod(blocks) * rows * columns * min(rows, columns)
    return n_values * each + _product_ns(op) + combining


def _storing_ns(op: Merge) -> float:
    """Return the nanoseconds of one core per value for decoding, rounding and encoding."""
    is_compiled = library() is not None
    found = 0.0
    if not op.source.storage.is_dense:
        found += _COMPILED_NS["decoding"] if is_compiled else _DECODING_NS
    if op.on_stored_grid and is_compiled:
        found += _COMPILED_NS["encoding"]
    elif not op.target.is_dense:
        found += _ENCODING_NS.get(op.target.codec, _OTHER_ENCODING_NS)
    if op.rounding is not None:
        by_loop = is_compiled and op.rounding.method == "adapter"
        found += _COMPILED_NS["rounding"] if by_loop else _ROUNDING_NS[op.rounding.method]
    return found


def _passing_ns(facts: Facts) -> float:
    """Return the nanoseconds of one core per value for more passes over the weight than one."""
    return facts.by_peft * _PEFT_LAYER_NS + facts.looks_back * _LOOKING_BACK_NS


def _product_ns(op: Merge) -> float:
    """Return the nanoseconds of one core for the products of factors: 2 r operations for each value that they change."""
    changed = (
        2 * delta.rank * math.prod(end - start for start, end in delta.region.box)
        if delta.region.box
        else 2 * delta.rank * math.prod(op.source.shape)
        for delta in op.deltas
        if delta.facts.has_factors
    )
    return sum(changed) / _FLOPS * 1e9

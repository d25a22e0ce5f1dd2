"""The plan: everything that will be read, computed and written, as plain frozen data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from lora_merge.core.adapter import DeltaSpec
from lora_merge.core.checkpoint import SideFile
from lora_merge.core.report import Issue, Summary
from lora_merge.core.shards import OutputFile
from lora_merge.core.tensor import TensorRef

RUNTIME_BYTES = 260 << 20
"""Resident memory of the interpreter with torch loaded, before the first tile."""

TILE_ELEMENTS = 1 << 19
"""Elements of a row tile: few enough to stay in the cache from reading to writing, enough to outweigh the
fixed cost of the dozen calls that a tile takes (measured: 2¹⁸ and 2²⁰ are slower)."""

MIN_TILE_ROWS = 64
"""Rows of the smallest tile. Matrix libraries use other kernels, with other rounding, for a handful of
rows; from 16 on every tile has the bits of the whole product (measured with MKL)."""


@dataclass(frozen=True, slots=True)
class Copy:
    """The bytes of a stored tensor, as they are."""

    source: TensorRef
    op: Literal["copy"] = "copy"


@dataclass(frozen=True, slots=True)
class Merge:
    """A stored tensor decoded to float32, changed by every delta in turn, encoded once.

    With no deltas it is a change of dtype.
    """

    codec: str
    """Names a codec in `lora_merge.codecs`."""

    parts: tuple[TensorRef, ...]
    """What the codec reads; the first is the weight itself."""

    deltas: tuple[DeltaSpec, ...]
    op: Literal["merge"] = "merge"


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of work: it reads its inputs and fills its own places, and needs no other step."""

    slots: tuple[TensorRef, ...]
    op: Copy | Merge

    @property
    def nbytes(self) -> int:
        """Return the bytes that the step writes."""
        return sum(slot.nbytes for slot in self.slots)


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything that a merge will read, compute and write."""

    base: str
    """Root of the base checkpoint."""

    adapters: tuple[str, ...]
    """Roots of the adapters, in the order their deltas are applied."""

    files: tuple[OutputFile, ...]
    steps: tuple[Step, ...]
    """In the order of the output's bytes."""

    side_files: tuple[SideFile, ...]
    config_patch: Mapping[str, Any]
    """Dotted path in ``config.json`` → new value; empty when the file is copied as it is."""

    index: str
    """Text of the index file; empty when the output is a single file without one."""

    issues: tuple[Issue, ...]
    """Warnings and notes; a plan with errors is never made."""

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> MergePlan:
        """Return the plan that `to_json` wrote.

        Raises:
            ValueError: the text is not such a plan.
        """
        from pydantic import TypeAdapter

        plan: MergePlan = TypeAdapter(cls).validate_json(text)
        return plan

    def disk_bytes(self) -> int:
        """Return the bytes that the output takes."""
        small = sum(file.nbytes for file in self.side_files) + len(self.index.encode())
        return small + sum(file.nbytes for file in self.files)

    def peak_bytes(self, n_workers: int) -> int:
        """Return an estimate of the resident memory of the merge, in bytes."""
        heaviest = max((_step_bytes(step) for step in self.steps), default=0)
        return RUNTIME_BYTES + n_workers * heaviest

    def summary(self, n_workers: int, disk_free_bytes: int) -> Summary:
        """Return the plan in numbers."""
        deltas = [delta for step in self.steps if isinstance(step.op, Merge) for delta in step.op.deltas]
        merged = [step for step in self.steps if isinstance(step.op, Merge) and step.op.deltas]
        cast = [step for step in self.steps if isinstance(step.op, Merge) and not step.op.deltas]
        copied = [step for step in self.steps if isinstance(step.op, Copy)]
        return Summary(
            n_merged=len(merged),
            n_cast=len(cast),
            n_copied=len(copied),
            merged_bytes=sum(step.nbytes for step in merged),
            cast_bytes=sum(step.nbytes for step in cast),
            copied_bytes=sum(step.nbytes for step in copied),
            n_shards=len(self.files),
            n_side_files=len(self.side_files),
            ranks=_count([str(delta.rank) for delta in deltas]),
            scales=_count([f"{delta.scale:g}" for delta in deltas]),
            peak_bytes=self.peak_bytes(n_workers),
            disk_needed_bytes=self.disk_bytes(),
            disk_free_bytes=disk_free_bytes,
        )


def tile_rows(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the row ranges that a tensor is worked on in: of equal size, give or take one row.

    Shapes:
        shape: ``[rows, …]``; a scalar is one row.

    Example:
        >>> tile_rows((1024, 1024))
        [(0, 512), (512, 1024)]
    """
    n_rows = shape[0] if shape else 1
    wanted = max(MIN_TILE_ROWS, TILE_ELEMENTS // max(math.prod(shape[1:]), 1))
    n_tiles = max(1, n_rows // wanted)
    bounds = [n_rows * k // n_tiles for k in range(n_tiles + 1)]
    return list(pairwise(bounds))


def _step_bytes(step: Step) -> int:
    """Return the memory that a worker needs for one step, in bytes."""
    match step.op:
        case Copy():
            return 4 * TILE_ELEMENTS
        case Merge(parts=parts, deltas=deltas):
            shape = parts[0].shape
            rows = max(end - start for start, end in tile_rows(shape))
            elements = rows * math.prod(shape[1:])
            factors = sum(4 * math.prod(ref.shape) for delta in deltas for ref in delta.tensors.values())
            # the raw tile, its float32 form, the delta, and the encoded tile
            return (8 + 4 + 4 + 8) * elements + 2 * factors


def _count(values: list[str]) -> dict[str, int]:
    return {value: values.count(value) for value in sorted(set(values), key=lambda text: (len(text), text))}

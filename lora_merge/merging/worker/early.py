"""Weights that compiled code merges before torch is loaded. Their bytes are written; what needs torch follows once it is there.

A merge waits a second for torch, and the disk could be written to meanwhile. Only the most frequent merge is begun early: one LoRA
on a bfloat16 weight, each value rounded to the nearest number. Whether torch would have summed in the same order is found out
afterwards (`adding.is_as_torch`); where it would not, the weight is merged again, so the bits are those of any other merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.core.adapter import PLAIN
from lora_merge.core.tensor import DTYPE_BITS
from lora_merge.core.weight import WEIGHT, PartRange
from lora_merge.deltas.low_rank import LowRankFacts, summing
from lora_merge.formats.safetensors import load_numbers
from lora_merge.merging.worker.adding import can_add, is_as_torch, may_add
from lora_merge.merging.worker.workbench import Parts
from lora_merge.native.library import Product, library

if TYPE_CHECKING:
    from collections.abc import Mapping  # noqa: TC004 - a field's type, never evaluated

    import numpy as np

    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.plan import Merge
    from lora_merge.merging.worker.changing import Working
    from lora_merge.merging.worker.filling import Filling  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.merging.worker.workbench import Workbench

    Numbers = np.ndarray[Any, np.dtype[np.float32]]
    Halves = np.ndarray[Any, np.dtype[np.uint16]]

_DTYPES = frozenset({"F32", "F16", "BF16"})
"""Of factors that are read without torch."""


def can_begin(op: Merge) -> bool:
    """Return whether compiled code alone can write what a merge makes."""
    return (
        can_add(op)
        and op.rounding is None
        and op.reach == "rows"
        and not op.fills_across
        and not op.surveyed
        and _is_plain(op.deltas[0])
    )


def _is_plain(delta: PlacedDelta) -> bool:
    """Return whether a change is one product of two factors as they are stored, on a whole matrix."""
    facts, factors = delta.facts, delta.factors
    if type(facts) is not LowRankFacts or facts != LowRankFacts() or factors.keys() != {"A", "B"}:
        return False
    a, b = factors["A"], factors["B"]
    return (
        delta.region == PLAIN
        and not delta.part
        and not delta.delta.transposed
        and {a.dtype, b.dtype} <= _DTYPES
        and len(a.shape) == len(b.shape) == 2
        and may_add(a.shape[0])
        and summing(delta, a.shape[0], (b.shape[0], a.shape[1])).is_product
    )


class HostFrame:
    """A tile in the buffers of one worker, where torch is not loaded: bfloat16 that is read, and that is written.

    Args:
        base: ``[rows, columns]``, 16 bits each; out: the same.
    """

    def __init__(self, base: Halves, out: Halves) -> None:
        self.base, self.out = base, out
        self.raw = {WEIGHT: base.data.cast("B")}
        self.encoded = {WEIGHT: out.data.cast("B")}

    def wait(self) -> None:
        """Return at once: `encoded` is complete."""

    def is_finite(self) -> bool:
        """Return True: what is not finite is not begun (`Factors.add`)."""
        return True


class HostFrames:
    """The buffers of one worker, as large as its largest tile so far, and the frames that are views of them."""

    def __init__(self) -> None:
        self._buffers: tuple[Halves, Halves] | None = None
        self._frames: dict[tuple[int, int], HostFrame] = {}

    def frame(self, rows: int, columns: int) -> HostFrame:
        """Return the frame for a tile of a shape; it is made once and kept."""
        import numpy as np

        found = self._frames.get((rows, columns))
        if found is None:
            n = rows * columns
            if self._buffers is None or len(self._buffers[0]) < n:
                self._frames.clear()
                self._buffers = np.empty(n, np.uint16), np.empty(n, np.uint16)
            found = HostFrame(*(buffer[:n].reshape(rows, columns) for buffer in self._buffers))
            self._frames[rows, columns] = found
        return found


class Factors:
    """What is added to the rows of one weight.

    Raises:
        CheckpointError: a factor cannot be read.
    """

    def __init__(self, delta: PlacedDelta) -> None:
        import numpy as np

        right, left = (load_numbers(delta.factors[role]) for role in ("A", "B"))
        is_fused = summing(delta, len(right), (len(left), right.shape[1])).is_fused
        self._left: Numbers = left * np.float32(delta.scale) if is_fused else left
        self._right: Numbers = right
        self.rank, self.scale = len(right), 1.0 if is_fused else delta.scale

    def add(self, frame: HostFrame, start: int, end: int) -> bool:
        """Write a tile with the product of its rows added. Return False where something is not finite."""
        found, left, right = library(), self._left[start:end], self._right
        if found is None:
            return False
        return found.add(
            Product(
                n_rows=len(left),
                n_columns=right.shape[1],
                base=frame.base.ctypes.data,
                out=frame.out.ctypes.data,
                left=left.ctypes.data,
                left_stride=left.shape[1],
                right=right.ctypes.data,
                right_stride=right.shape[1],
                rank=self.rank,
                scale=self.scale,
            )
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a tile that are compared, as they were read and as they are written."""

    tile: int
    base: bytes
    out: bytes

    @classmethod
    def of(cls, tile: int, frame: HostFrame, n: int) -> Rows:
        """Return the first n rows of a tile."""
        return cls(tile, frame.base[:n].tobytes(), frame.out[:n].tobytes())


@dataclass(frozen=True, slots=True)
class Begun:
    """A weight whose bytes are written, and whose records wait for torch."""

    output: Filling
    digests: Mapping[str, str]
    """Of what was read, by role."""

    rank: int
    scale: float
    rows: Rows | None
    """None where nothing is compared."""

    def is_as_torch(self) -> bool:
        """Return whether torch would have written the same bits."""
        return is_as_torch(self.rank, self.scale)

    def compare(self, bench: Workbench, working: Working) -> None:
        """Compare the rows that were kept with what the deltas make of them.

        Args:
            bench: with buffers for them.
            working: of the deltas. That of `output` would keep their factors for as long as this is kept.

        Raises:
            CheckpointError: a factor cannot be read.
        """
        if self.rows is None:
            return
        output, op = self.output, self.output.op
        tile = output.tiles[self.rows.tile]
        columns = op.view.columns
        n_rows = output.sample.n_multiplied(tile.end - tile.start, columns)
        part = PartRange("BF16", (n_rows, columns), ((0, n_rows * columns * DTYPE_BITS["BF16"] // 8),))
        frame = bench.frame(
            n_rows, columns, Parts(op.source.storage, {WEIGHT: part}), Parts(op.target, {WEIGHT: part})
        )
        # Those that are only multiplied may be anything.
        for buffer, kept in ((frame.raw, self.rows.base), (frame.encoded, self.rows.out)):
            buffer[WEIGHT][: len(kept)] = kept
            buffer[WEIGHT][len(kept) :] = bytes(len(buffer[WEIGHT]) - len(kept))
        output.compare(self.rows.tile, frame, working.on(tile.start, tile.end))

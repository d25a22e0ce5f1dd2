"""Weights that compiled code merges alone, without torch: one LoRA on a bfloat16 weight, each value rounded to the nearest number.

It is the most frequent merge, and loading torch takes longer than most of its files. Where torch is needed for other weights, these are
merged while it is loaded. `lora_merge.merging.worker.coded` does the same for quantised weights that keep their scales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.checks.expecting import is_plain_product
from lora_merge.core.weight import WEIGHT
from lora_merge.deltas.low_rank import summing
from lora_merge.formats.safetensors import load_numbers
from lora_merge.merging.worker.adding import add_rows, can_add, compare, may_add
from lora_merge.rounding.lines import Added

if TYPE_CHECKING:
    import numpy as np

    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.plan import Merge
    from lora_merge.core.weight import Tile
    from lora_merge.merging.worker.choosing import Choosing
    from lora_merge.merging.worker.filling import Encoded
    from lora_merge.merging.worker.sample import Sample

    Numbers = np.ndarray[Any, np.dtype[np.float32]]
    Halves = np.ndarray[Any, np.dtype[np.uint16]]


def is_plain(op: Merge) -> bool:
    """Return whether compiled code alone can write what a merge makes."""
    return (
        can_add(op)
        and op.rounding is None
        and op.reach == "rows"
        and not (op.fills_across or op.surveyed)
        and op.view.columns % 2 == 0  # else torch projects its rows
        and is_added(op.deltas[0])
    )


def is_added(delta: PlacedDelta) -> bool:
    """Return whether compiled code adds the product of a delta, in one pass."""
    if not is_plain_product(delta):
        return False
    a, b = delta.factors["A"], delta.factors["B"]
    return may_add(a.shape[0]) and summing(delta, a.shape[0], (b.shape[0], a.shape[1])).is_product


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
        """Return True: what is not finite is not written (`Addend.add`)."""
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


def added_of(delta: PlacedDelta) -> Added:
    """Return the product that a delta adds, for which `is_added` is true.

    Raises:
        CheckpointError: a factor cannot be read.
    """
    import numpy as np

    right, left = (load_numbers(delta.factors[role]) for role in ("A", "B"))
    if not summing(delta, len(right), (len(left), right.shape[1])).is_fused:
        return Added(left, right, delta.scale)
    with np.errstate(all="ignore"):  # what is infinite is seen when it is added
        return Added(left * np.float32(delta.scale), right, 1.0)


class Addend:
    """What is added to the rows of one weight: s · B A.

    Raises:
        CheckpointError: a factor cannot be read.
    """

    stage = "change"
    """Of the time that `add` takes (`lora_merge.merging.worker.stopwatch`)."""

    def __init__(self, op: Merge) -> None:
        self._added = added_of(op.deltas[0])

    def add(self, frame: Encoded, tile: Tile) -> bool:
        """Write a tile with the product of its rows added. Return False where something is not finite."""
        assert isinstance(frame, HostFrame)
        left, right, scale = self._added
        return add_rows(frame.base, frame.out, left[tile.start : tile.end], right, scale)

    def compare(self, sample: Sample, frame: Encoded, tile: Tile) -> None:
        """Compare the wanted change of a tile's first rows with the change that is written.

        Args:
            sample: gets what is found.
            frame: of a tile that `add` has written.
            tile: which rows.
        """
        assert isinstance(frame, HostFrame)
        n, start, (left, right, scale) = sample.n_compared(*frame.base.shape), tile.start, self._added
        compare(sample, frame.base[:n], frame.out[:n], left[start : start + n], right, scale)

    def account(self, choosing: Choosing) -> None:
        """Do nothing: no account is kept of nearest numbers."""

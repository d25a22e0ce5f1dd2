"""Quantised weights that compiled code merges alone, without torch: one LoRA on codes that keep their scales, each rounded to the nearest
number or for the adapter.

The codes are those that torch's way stores: both have the same row space, feedback and compiled loop (`lora_merge.rounding.lines`).
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

from lora_merge.checks.expecting import is_one_product
from lora_merge.codecs.host import host_grid, is_host
from lora_merge.core.weight import WEIGHT
from lora_merge.merging.worker.plain import added_of, is_added
from lora_merge.native.library import library
from lora_merge.rounding.basis import row_space_of
from lora_merge.rounding.feedback import damping_for, feedback_of, no_feedback
from lora_merge.rounding.lines import Added, Place, Scales, merge_codes
from lora_merge.runtime.shortage import BLAS_BYTES, need_room

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from lora_merge.core.plan import Merge
    from lora_merge.core.weight import PartRange, Tile
    from lora_merge.merging.worker.choosing import Choosing
    from lora_merge.merging.worker.filling import Encoded
    from lora_merge.merging.worker.sample import Sample
    from lora_merge.merging.worker.workbench import Parts
    from lora_merge.rounding.feedback import Feedback

    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_NARROW = 16
"""Inputs for each direction below which verification needs torch (`lora_merge.checks.coded_rows`)."""


def is_coded(op: Merge) -> bool:
    """Return whether compiled code alone can write what a merge makes of codes."""
    return (
        library() is not None
        and op.on_stored_grid
        and is_host(op.source.storage, op.source.shape)
        and is_one_product(op)
        and op.reach == "rows"
        and op.deltas[0].rank * _NARROW <= op.view.columns
        and is_added(op.deltas[0])
    )


class CodedFrame:
    """A tile in the buffers of one worker: the bytes of each part that is read, and of the codes that are written."""

    def __init__(self, stored: Mapping[str, Bytes], written: Mapping[str, Bytes]) -> None:
        self.stored, self.written = stored, written
        self.raw = {role: content.data for role, content in stored.items()}
        self.encoded = {role: content.data for role, content in written.items()}

    def wait(self) -> None:
        """Return at once: `encoded` is complete."""

    def is_finite(self) -> bool:
        """Return True: what is not finite is not written (`CodedAddend.add`)."""
        return True


class CodedFrames:
    """The buffers of one worker, as large as its largest tile so far, and the frames that are views of them."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Bytes] = {}
        self._frames: dict[tuple[tuple[str, str, int], ...], CodedFrame] = {}

    def frame(self, read: Parts, written: Parts) -> CodedFrame:
        """Return the frame for parts of some sizes; it is made once and kept."""
        sizes = [("read", role, part) for role, part in read.ranges.items()]
        sizes += [("written", role, part) for role, part in written.ranges.items()]
        key = tuple((use, role, part.nbytes) for use, role, part in sizes)
        found = self._frames.get(key)
        if found is None:
            views = {(use, role): self._view(use, role, part) for use, role, part in sizes}
            found = self._frames[key] = CodedFrame(
                *(
                    {role: view for (own, role), view in views.items() if own == use}
                    for use in ("read", "written")
                )
            )
        return found

    def _view(self, use: str, role: str, part: PartRange) -> Bytes:
        import numpy as np

        held = self._buffers.get((use, role))
        if held is None or len(held) < part.nbytes:
            self._frames.clear()
            held = self._buffers[use, role] = np.empty(part.nbytes, np.uint8)
        return held[: part.nbytes]


class CodedAddend:
    """What is added to the rows of one weight, s · B A, and how the codes of the sums are chosen.

    Args:
        op: what is done to it, for which `is_coded` is true.

    Raises:
        CheckpointError: a factor cannot be read.
    """

    stage = "encode"
    """Of the time that `add` takes (`lora_merge.merging.worker.stopwatch`)."""

    def __init__(self, op: Merge) -> None:
        self._op, self._added = op, added_of(op.deltas[0])
        self._is_fed_back = op.rounding is not None
        self._feedback = self._made()
        self._errors = 0.0

    def _made(self) -> Feedback | None:
        """Return how errors are fed back; None where the factors are zero, or not finite."""
        import numpy as np

        right = self._added.right
        basis = row_space_of([right]) if np.isfinite(right).all() else None
        if basis is None:
            return None
        return feedback_of(basis, damping_for(*basis.shape)) if self._is_fed_back else no_feedback(basis)

    def add(self, frame: Encoded, tile: Tile) -> bool:
        """Write the codes of a tile with the product of its rows added. Return False where something is not finite, or a scale means
        nothing.
        """
        import numpy as np

        assert isinstance(frame, CodedFrame)
        storage = self._op.source.storage
        grid = None if self._feedback is None else host_grid(tile, frame.stored, storage)
        if grid is None or self._feedback is None:
            return False
        left, right, factor = self._added
        written = frame.written[WEIGHT].reshape(grid.stored.shape)
        error = merge_codes(
            grid.stored,
            grid.levels,
            Scales(grid.lattice, grid.group, grid.scale),
            Added(left[tile.start : tile.end], right, factor),
            self._feedback,
            Place(written, grid.bits, grid.offset, grid.stored, grid.keeps_signs),
            is_fed_back=self._is_fed_back,
        )
        if error is None:
            return False
        # Not finite where one of the errors is not: squares of float32 numbers are far from the ends of float64.
        with np.errstate(all="ignore"):
            self._errors += float(np.square(error, dtype=np.float64).sum())
        return isfinite(self._errors)

    def compare(self, sample: Sample, frame: Encoded, tile: Tile) -> None:
        """Compare the wanted change of a tile's first rows with the change that is written.

        Args:
            sample: gets what is found.
            frame: of a tile that `add` has written.
            tile: which rows.
        """
        import numpy as np

        assert isinstance(frame, CodedFrame)
        grid = host_grid(tile, frame.stored, self._op.source.storage)
        assert grid is not None
        left, right, factor = self._added
        n = sample.n_compared(len(grid.stored), grid.width)
        written = frame.written[WEIGHT].reshape(grid.stored.shape)
        with np.errstate(all="ignore"):
            before = grid.values(grid.stored[:n])
            # Not by a matrix library, whose sums depend on the machine.
            change = np.einsum("ik,kj->ij", left[tile.start : tile.start + n], right)
            wanted = before + change * np.float32(factor)
            numbers, (first, last) = wanted / grid.spread(n), grid.lattice.ends
        # Up to half a step of integers beyond an end, the end is the nearest level anyway.
        saturated = float(((numbers < first - 0.5) | (numbers > last + 0.5)).mean())
        sample.see(before, wanted, grid.values(written[:n]), saturated)

    def account(self, choosing: Choosing) -> None:
        """Tell what the change is, and what rounding did to it, once all tiles are written."""
        import numpy as np

        need_room(BLAS_BYTES, "multiply matrices")
        left, right, factor = self._added
        b, a = left.astype(np.float64) * factor, right.astype(np.float64)
        with np.errstate(all="ignore"):  # what is not finite is not written
            # ‖BA‖² = ⟨BᵀB, AAᵀ⟩ takes r² for each row in place of its width.
            choosing.know(float(((b.T @ b) * (a @ a.T)).sum()), self._errors)

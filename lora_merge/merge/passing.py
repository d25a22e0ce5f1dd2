"""What looks at the tiles of a tensor as they pass, for the verification that follows: projections, digests of some tiles.

It is given bytes, as they were read and as they are written, and nothing that the merge made of them.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lora_merge.checks.projection import Projection
from lora_merge.core.tensor import DTYPE_BITS
from lora_merge.io.files import digest_text, new_digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.checks.weighing import Pattern, TileViews
    from lora_merge.core.plan import Merge
    from lora_merge.core.tensor import TensorRef
    from lora_merge.merge.workbench import Frame

BLOCK_EVERY = 8
"""One tile in so many is read back from the disk, where not all are."""

_VIEWS: WeakKeyDictionary[Frame, dict[tuple[str, Pattern], TileViews]] = WeakKeyDictionary()
"""Of the buffers of each frame: they stay the same from tile to tile."""


class Passing:
    """The eyes on one tensor.

    Args:
        op: what is done to it.
        slot: where it goes.
        tiles: its row ranges, in order.
    """

    def __init__(self, op: Merge, slot: TensorRef, tiles: Sequence[tuple[int, int]]) -> None:
        self._tiles = tiles
        self._read, self._written = op.parts[0].dtype, slot.dtype
        self._row_bytes = op.view.columns * DTYPE_BITS[slot.dtype] // 8
        self._projection = Projection(op, slot, tiles)
        self._drawn = zlib.crc32(slot.name.encode()) % min(BLOCK_EVERY, max(len(tiles), 1))
        self._blocks: list[tuple[int, int, str]] = []

    def before(self, n: int, frame: Frame) -> None:
        """Look at a tile as it was read."""
        self._projection.before(n, self._views(n, frame, "raw"))

    def after(self, n: int, frame: Frame) -> None:
        """Look at a tile as it is written."""
        if n % BLOCK_EVERY == self._drawn:
            start, _ = self._tiles[n]
            digest = new_digest()
            digest.update(frame.encoded)
            self._blocks.append((start * self._row_bytes, len(frame.encoded), digest_text(digest)))
        self._projection.after(n, self._views(n, frame, "encoded"))

    def _views(self, n: int, frame: Frame, role: str) -> TileViews:
        found = _VIEWS.setdefault(frame, {})
        key = role, self._projection.pattern
        if key not in found:
            start, end = self._tiles[n]
            content, dtype = (frame.raw, self._read) if role == "raw" else (frame.encoded, self._written)
            found[key] = self._projection.views(content, end - start, dtype)
        return found[key]

    def suspects(self) -> tuple[tuple[int, int], ...] | None:
        """Return the rows to be looked at again; None where nothing can be said.

        Raises:
            CheckpointError: a factor cannot be read.
        """
        return self._projection.suspects()

    def blocks(self) -> tuple[tuple[int, int, str], ...]:
        """Return digests of some tiles: offset in the tensor, bytes, digest."""
        return tuple(self._blocks)

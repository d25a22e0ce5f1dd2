"""What looks at the tiles of a tensor while they pass, for verification: random projections, and digests of some tiles.

It is given bytes, as they were read and as they are written, and nothing that the merge made of them.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from lora_merge.checks.projection import Projection
from lora_merge.core.weight import WEIGHT
from lora_merge.storage.digests import digest_text, new_digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_merge.checks.weighing import CompiledViews, Pattern, TileViews
    from lora_merge.core.plan import Merge
    from lora_merge.core.tensor import TensorRef
    from lora_merge.core.weight import PartRange
    from lora_merge.merging.worker.filling import Encoded

BLOCK_EVERY = 8
"""One tile in eight is read back from the disk, where not all are: its digest is taken while it is in the cache."""

_VIEWS: WeakKeyDictionary[Encoded, dict[tuple[str, Pattern], TileViews | CompiledViews]] = WeakKeyDictionary()
"""Views of each frame's buffers. They are the same for every tile of a shape, so they are made once."""


class _Seen(NamedTuple):
    """A frame, and the views of one of its buffers."""

    frame: Encoded
    views: TileViews | CompiledViews


class Passing:
    """Looks at every tile of one weight. Only plain tensors are projected: what a codec makes of a value depends on others.

    Args:
        op: what is done to it.
        writes: role → where it goes.
        tiles: its row ranges, in order.
    """

    def __init__(self, op: Merge, writes: Mapping[str, TensorRef], tiles: Sequence[tuple[int, int]]) -> None:
        self._tiles = tiles
        self._read, self._written = op.source.dtype, op.target.dtype
        slot = next(iter(writes.values()))
        is_plain = op.source.storage.is_dense and op.target.is_dense
        self._projection = Projection(op, slot, tiles) if is_plain else None
        # By the tensor's name: the same tiles in every run, and not the same ones in every tensor.
        self._drawn = zlib.crc32(slot.name.encode()) % min(BLOCK_EVERY, max(len(tiles), 1))
        self._blocks: dict[str, list[tuple[int, int, str]]] = {role: [] for role in writes}
        # Nearly all tiles of a tensor have one shape, and so one frame.
        self._last: dict[str, _Seen] = {}

    def before(self, n: int, frame: Encoded) -> None:
        """Project a tile as it was read."""
        if self._projection is not None:
            self._projection.before(n, self._views(self._projection, n, frame, "raw"))

    def after(self, n: int, frame: Encoded, ranges: Mapping[str, PartRange]) -> None:
        """Project a tile as it is written, and take its digest if it is one of those drawn."""
        if n % BLOCK_EVERY == self._drawn:
            for role, part in ranges.items():
                self._take_digests(role, part, frame.encoded[role])
        if self._projection is not None:
            self._projection.after(n, self._views(self._projection, n, frame, "encoded"))

    def _take_digests(self, role: str, part: PartRange, content: memoryview) -> None:
        at = 0
        for first, nbytes in part.ranges:
            digest = new_digest()
            digest.update(content[at : at + nbytes])
            self._blocks[role].append((first, nbytes, digest_text(digest)))
            at += nbytes

    def _views(self, projection: Projection, n: int, frame: Encoded, use: str) -> TileViews | CompiledViews:
        last = self._last.get(use)
        if last is None or last.frame is not frame:
            last = self._last[use] = _Seen(frame, self._found(projection, n, frame, use))
        return last.views

    def _found(self, projection: Projection, n: int, frame: Encoded, use: str) -> TileViews | CompiledViews:
        found = _VIEWS.setdefault(frame, {})
        key = use, projection.pattern
        if key not in found:
            start, end = self._tiles[n]
            content, dtype = (frame.raw, self._read) if use == "raw" else (frame.encoded, self._written)
            found[key] = projection.views(content[WEIGHT], end - start, dtype)
        return found[key]

    def suspects(self) -> tuple[tuple[int, int], ...] | None:
        """Return the row ranges whose projections do not match the expected change; None where nothing is projected.

        Raises:
            CheckpointError: a factor cannot be read.
        """
        return self._projection.suspects() if self._projection is not None else None

    def blocks(self, role: str) -> tuple[tuple[int, int, str], ...]:
        """Return the digests of the drawn tiles of a part: offset in the part, size in bytes, digest."""
        return tuple(self._blocks[role])

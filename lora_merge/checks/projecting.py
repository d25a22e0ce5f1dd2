"""Projections of a tensor that was merged earlier, from the files of base and output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.checks.projection import Projection
from lora_merge.core.plan import Merge
from lora_merge.core.weight import WEIGHT
from lora_merge.storage.reading import read_into
from lora_merge.storage.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.checks.weighing import CompiledViews, TileViews
    from lora_merge.core.plan import Step
    from lora_merge.core.tensor import TensorRef
    from lora_merge.storage.sources import Source


def suspects_of(step: Step, here: Mapping[str, TensorRef]) -> tuple[tuple[int, int], ...] | None:
    """Return the rows of a merged weight that projections suspect; None where a codec stores it, or projections
    cannot tell.

    Args:
        step: what made it.
        here: role → where it is stored now.

    Raises:
        CheckpointError: a file cannot be read.
    """
    op = step.op
    assert isinstance(op, Merge)
    source = op.source.plain
    if source is None or not op.target.is_dense:
        return None
    return _projected(op, source, step.writes[WEIGHT], here[WEIGHT]).suspects()


def _projected(op: Merge, source: TensorRef, slot: TensorRef, here: TensorRef) -> Projection:
    """Return the projection of a merged tensor. Base and output are read once each."""
    view = op.view
    tiles = [tile for tile in view.tiles() if (tile[1] - tile[0]) * view.columns]
    projection = Projection(op, slot, tiles)
    buffers: dict[tuple[str, int], tuple[memoryview, TileViews | CompiledViews]] = {}

    def seen(file: Source, ref: TensorRef, role: str, tile: tuple[int, int]) -> TileViews | CompiledViews:
        """Return the views of a tile that is read into a buffer; the next tile of its size uses the same buffer."""
        start, end = tile
        row_bytes = ref.nbytes // view.n_rows
        if (role, end - start) not in buffers:
            content = memoryview(bytearray((end - start) * row_bytes))
            buffers[role, end - start] = content, projection.views(content, end - start, ref.dtype)
        content, views = buffers[role, end - start]
        read_into(file, content, ref.start + start * row_bytes)
        return views

    with open_source(source.file) as base, open_source(here.file) as output:
        for n, tile in enumerate(tiles):
            projection.before(n, seen(base, source, "base", tile))
            projection.after(n, seen(output, here, "output", tile))
    return projection

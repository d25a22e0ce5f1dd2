"""Projections of a tensor that was merged earlier, from the files of base and output."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lora_merge.checks.expecting import manner_of
from lora_merge.checks.projection import Projection
from lora_merge.checks.weighing import Pattern
from lora_merge.core.plan import Merge
from lora_merge.core.tensor import TORCH_NAMES
from lora_merge.core.weight import WEIGHT
from lora_merge.formats.safetensors import are_finite, blocks
from lora_merge.native.library import library
from lora_merge.storage.digests import digest_text, new_digest
from lora_merge.storage.reading import read_into
from lora_merge.storage.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lora_merge.checks.weighing import CompiledViews, TileViews
    from lora_merge.core.plan import Step
    from lora_merge.core.tensor import TensorRef
    from lora_merge.storage.sources import Source


class OneReading(NamedTuple):
    """What one reading tells of a tensor that a merge made."""

    digest: str
    finite: bool
    projection: Projection | None
    """None where a codec stores the weight, before or after the merge."""


def has_floats(op: Merge, role: str, dtype: str) -> bool:
    """Return whether a part of a merged weight holds numbers that may be NaN or infinite.

    Args:
        op: what made it.
        role: of the part.
        dtype: of the part, as it is stored.
    """
    # bitsandbytes may keep its codes under a dtype of floats.
    is_codes = role == WEIGHT and not op.target.is_dense
    return not is_codes and dtype in TORCH_NAMES


def read_once(step: Step, role: str, here: TensorRef) -> OneReading:
    """Read a part of a merged weight once, and its base with it where rows are projected.

    Args:
        step: what made it.
        role: of the part.
        here: where it is stored now.

    Raises:
        CheckpointError: a file cannot be read.
    """
    op = step.op
    assert isinstance(op, Merge)
    digest, finite, may_be_wrong = new_digest(), True, has_floats(op, role, here.dtype)

    def see(content: memoryview) -> None:
        nonlocal finite
        digest.update(content)
        finite = finite and (not may_be_wrong or are_finite(content, here.dtype))

    projection = None
    if op.target.is_dense and op.source.plain is not None:
        projection = projected(step, here, see)
    else:
        for content in blocks(here):
            see(content)
    return OneReading(digest_text(digest), finite, projection)


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
    if op.source.plain is None or not op.target.is_dense:
        return None
    return projected(step, here[WEIGHT], lambda _: None).suspects()


def needs_no_torch(step: Step) -> bool:
    """Return whether compiled code can take the projections of a tensor. `Projection.suspects` may still need torch
    (`lora_merge.checks.expecting.is_plain_sum`).
    """
    op = step.op
    if not isinstance(op, Merge) or library() is None or op.source.plain is None or not op.target.is_dense:
        return False
    slot = step.writes[WEIGHT]
    pattern = Pattern.of(slot.name, op.view.columns, op.source.dtype, slot.dtype)
    return pattern.halved and manner_of(op) != "directions"


def projected(step: Step, here: TensorRef, see: Callable[[memoryview], None]) -> Projection:
    """Return the projection of a plain merged tensor. Base and output are read once each.

    Args:
        step: what made it.
        here: where it is stored now.
        see: gets every byte of the output's tensor, in order.

    Raises:
        CheckpointError: a file cannot be read.
    """
    op = step.op
    assert isinstance(op, Merge)
    source, view = op.source.plain, op.view
    assert source is not None
    tiles = [tile for tile in view.tiles() if (tile[1] - tile[0]) * view.columns]
    projection = Projection(op, step.writes[WEIGHT], tiles)
    buffers: dict[tuple[str, int], tuple[memoryview, TileViews | CompiledViews]] = {}

    def read(
        file: Source, ref: TensorRef, role: str, tile: tuple[int, int]
    ) -> tuple[memoryview, TileViews | CompiledViews]:
        """Return a tile that is read into a buffer, and views of it; the next tile of its size uses the same buffer."""
        start, end = tile
        row_bytes = ref.nbytes // view.n_rows
        if (role, end - start) not in buffers:
            content = memoryview(bytearray((end - start) * row_bytes))
            buffers[role, end - start] = content, projection.views(content, end - start, ref.dtype)
        content, views = buffers[role, end - start]
        read_into(file, content, ref.start + start * row_bytes)
        return content, views

    with open_source(source.file) as base, open_source(here.file) as output:
        for n, tile in enumerate(tiles):
            _, views = read(base, source, "base", tile)
            projection.before(n, views)
            content, views = read(output, here, "output", tile)
            projection.after(n, views)
            see(content)
    return projection

"""How much of a weight a worker has in hand at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core import view

if TYPE_CHECKING:
    from lora_merge.core.plan import Merge

_CODES = 4
"""So many times as many are in a tile of codes that become other codes: compiled code takes a byte or less of each, and none of their
values (`lora_merge.rounding.compiled.merge_codes`). The fewer tiles, the fewer calls from Python."""


def tiles_of(op: Merge, elements: int | None = None) -> list[tuple[int, int]]:
    """Return the row ranges of a weight to work on, in order; see `Merge.tiles`.

    Args:
        op: what is done to it.
        elements: of a tile of values, about; default: `view.TILE_ELEMENTS`.
    """
    elements = elements or view.TILE_ELEMENTS
    # On a GPU they are larger anyway, and all of them are values there.
    is_small = elements <= view.TILE_ELEMENTS
    return op.tiles(_CODES * elements if op.on_stored_grid and is_small else elements)

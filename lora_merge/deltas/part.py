"""An algebra on a part of the stored tensor only: an expert of a stack, the upper half of two."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from lora_merge.core.view import Block
    from lora_merge.deltas.algebra import Algebra, Panels


class Part:
    """Shows an algebra its own rows and columns of each tile, as if there were no others.

    Args:
        algebra: of the part.
        block: where the part is in the stored tensor.
    """

    def __init__(self, algebra: Algebra, block: Block) -> None:
        self._algebra, self._block = algebra, block

    def survey(self, panels: Panels) -> None:
        """Show the algebra its part of each panel of columns."""
        self._algebra.survey(self._of_panels(panels))

    def _of_panels(self, panels: Panels) -> Iterator[tuple[int, int, torch.Tensor]]:
        first, last = self._block.columns
        for start, end, panel in panels:
            # A panel that the part has no columns in is left out.
            left, right = max(start, first), min(end, last)
            if left < right:
                yield left - first, right - first, panel[:, left - start : right - start]

    def apply(self, weight: torch.Tensor, base: torch.Tensor, start: int, end: int) -> None:
        """Let the algebra change those of the rows ``start`` to ``end`` of the stored tensor that are its own."""
        columns = slice(*self._block.columns)
        # What the algebra takes for its row number: the part's rows, counted through all of its ranges.
        done = 0
        for first, last in self._block.row_ranges():
            low, high = max(first, start), min(last, end)
            if low < high:
                rows = slice(low - start, high - start)
                mine = weight[rows, columns]
                # The same tensor for both says that no delta came before (`Changer.apply`).
                before = mine if base is weight else base[rows, columns]
                self._algebra.apply(mine, before, done + low - first, done + high - first)
            done += last - first

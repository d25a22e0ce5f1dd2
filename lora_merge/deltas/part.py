"""An algebra on a part of the stored tensor only: an expert of a stack, the upper half of two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.deltas.algebra import Look

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from lora_merge.core.view import Block
    from lora_merge.deltas.algebra import Algebra, Panels, Product


class Part:
    """Shows an algebra its own rows and columns of each tile, as if there were no others.

    Args:
        algebra: of the part.
        block: where the part is in the stored tensor.
        transposed: whether the tensor is stored ``[in, out]``.
    """

    def __init__(self, algebra: Algebra, block: Block, *, transposed: bool = False) -> None:
        self._algebra, self._block, self._transposed = algebra, block, transposed

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

    def product(self, start: int, end: int) -> Product | None:
        """Return nothing: other rows and columns stay as they are."""
        del start, end
        return None

    def looks(self) -> Sequence[Look]:
        """Return what the algebra sees, with outputs and inputs as the whole tensor counts them."""
        block = self._block
        ranges, inputs = block.row_ranges(), block.columns
        if self._transposed:
            ranges, inputs = block.column_ranges(), block.rows
        found = []
        for look in self._algebra.looks():
            done = 0
            for first, last in ranges:
                low, high = max(look.outputs[0], done), min(look.outputs[1], done + last - first)
                if low < high:
                    own = slice(low - look.outputs[0], high - look.outputs[0])
                    outputs = (first + low - done, first + high - done)
                    other = None if look.other is None else look.other[own]
                    found.append(Look(outputs, inputs[0] + look.first_input, look.factor, other, look.scale))
                done += last - first
        return found

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

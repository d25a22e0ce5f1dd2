"""A few rows before and after the merge: how much of the delta the stored dtype kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.codecs import CODECS
from lora_merge.codecs.beginning import beginning_of
from lora_merge.core.tensor import Survival
from lora_merge.core.weight import WEIGHT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    import torch

    from lora_merge.codecs.grid import Grid
    from lora_merge.core.plan import Merge
    from lora_merge.core.weight import Tile
    from lora_merge.deltas.algebra import Product
    from lora_merge.merging.worker.workbench import Frame

    Numbers = np.ndarray[Any, np.dtype[np.float32]]

SAMPLE_ELEMENTS = 1 << 14
"""At most so many elements of each merged tensor are compared."""


class Sample:
    """The first rows of the middle tile of a tensor, kept as they were before the merge.

    Nothing waits for the device until `survival` is called.

    Args:
        op: what is done to the tensor.
        n_tiles: in how many tiles.
        elements: that are compared at most.
    """

    def __init__(self, op: Merge, n_tiles: int, elements: int = SAMPLE_ELEMENTS) -> None:
        self._elements = elements
        self._target = op.target
        # Of a tensor whose rows are trained one by one, a sample would miss those rows. -1 is no tile's number.
        self._tile = n_tiles // 2 if any(not delta.facts.replaces_rows for delta in op.deltas) else -1
        self._saturated: torch.Tensor | None = None
        self._before: torch.Tensor | None = None
        self._found: Callable[[], list[float]] | None = None

    def has(self, tile: int) -> bool:
        """Return whether it is the tile whose rows are compared."""
        return tile == self._tile

    def n_compared(self, rows: int, columns: int) -> int:
        """Return how many rows are compared of a tile with so many rows and columns, the first ones."""
        return max(1, min(rows, self._elements // max(columns, 1)))

    def before(self, tile: int, frame: Frame) -> None:
        """Keep the rows of a tile, if it is the middle one."""
        if tile == self._tile:
            self._before = self._rows(frame.values).clone()

    def look(self, frame: Frame, rows: Tile, grid: Grid) -> None:
        """Count the values of the rows beyond the ends of a grid, before they are rounded."""
        if self._before is None or self._saturated is not None or self._target.is_dense:
            return
        self._count(self._rows(frame.values), rows, grid)

    def _count(self, values: torch.Tensor, rows: Tile, grid: Grid) -> None:
        lines = values.reshape(-1, rows.shape[-1])
        numbers, (first, last) = grid.of_lines(0, len(lines)).numbers(lines), grid.lattice.ends
        # Up to half a step of integers beyond an end, the end is the nearest level anyway.
        self._saturated = ((numbers < first - 0.5) | (numbers > last + 0.5)).float().mean()

    def after(self, tile: int, frame: Frame, rows: Tile, stored: Mapping[str, torch.Tensor]) -> None:
        """Compare the wanted change of the rows with the change that will be stored.

        Args:
            tile: its number.
            frame: with the encoded tile.
            rows: which they are.
            stored: the parts that it was read from.
        """
        if tile != self._tile or self._before is None:
            return
        self._compare(self._before, self._rows(frame.values), self._stored(frame, rows, stored))

    def compare(
        self,
        frame: Frame,
        rows: Tile,
        stored: Mapping[str, torch.Tensor],
        product: Product,
        grid: Grid,
    ) -> None:
        """Compare the same where a tile was merged past its values.

        Args:
            frame: with the encoded tile.
            rows: which they are.
            stored: the parts that it was read from, in the storage that is written.
            product: that was added; grid: whose codes were stored.
        """
        n = self.n_compared(*frame.values.shape)
        before = self._decoded(rows, n, stored, frame.values)
        wanted = before.addmm(product.left[:n], product.right, alpha=product.scale)
        self._count(wanted, rows, grid)
        self._compare(before, wanted, self._decoded(rows, n, {**stored, **frame.rounded}, before))

    def _compare(self, before: torch.Tensor, values: torch.Tensor, written: torch.Tensor) -> None:
        """Compare the wanted change of some rows with the change that will be stored.

        Args:
            before: float32 ``[rows, columns]``; values: after the change; written: as they are stored.
        """
        import torch

        wanted, kept = values - before, written - before
        touched = wanted != 0
        lost = (kept == 0) & touched
        saturated = self._saturated if self._saturated is not None else wanted.new_zeros(())
        # Squares of large numbers are beyond float32.
        before, error, kept, wanted = (part.double() for part in (before, kept - wanted, kept, wanted))
        norm = torch.linalg.vector_norm
        # On the device: reading the numbers here would wait for the GPU in the middle of the loop.
        self._found = torch.stack(
            [
                norm(before),
                norm(wanted),
                norm(error),
                touched.sum().double(),
                lost.sum().double(),
                (kept * wanted).sum(),
                saturated.double(),
            ]
        ).tolist

    def see(self, before: Numbers, wanted: Numbers, stored: Numbers, saturated: float = 0.0) -> None:
        """Take in the rows of the middle tile where torch is not loaded.

        Args:
            before: float32 ``[rows, columns]``; wanted: after the change; stored: as they are written.
            saturated: the share of wanted values beyond the ends of the grid.
        """
        import numpy as np

        # What is too large becomes infinite, as with torch.
        with np.errstate(all="ignore"):
            change, kept = wanted - before, stored - before
            touched = change != 0
            # Not by a matrix library: the same on every machine, whatever its threads.
            squares = (np.square(part, dtype=np.float64).sum() for part in (before, change, kept - change))
            found = [
                *(float(np.sqrt(square)) for square in squares),
                float(touched.sum()),
                float(((kept == 0) & touched).sum()),
                float(np.multiply(kept, change, dtype=np.float64).sum()),
                saturated,
            ]
        self._found = lambda: found

    def survival(self, effect: tuple[float, float]) -> Survival | None:
        """Return the norms of weight, delta and rounding error in these rows, and the share of values that did not
        change; None where nothing was sampled.

        Args:
            effect: as `Choosing.effect` has it.
        """
        if self._found is None:
            return None
        weight, delta, error, n_touched, n_lost, product, saturated = self._found()
        return Survival(
            weight,
            delta,
            error,
            unchanged=n_lost / n_touched if n_touched else 0.0,
            kept=product / delta**2 if delta else 1.0,
            saturated=saturated,
            effect_norm=effect[0],
            effect_error=effect[1],
        )

    def _stored(self, frame: Frame, rows: Tile, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the rows as they will be read from the output, float32."""
        if self._target.is_dense:
            return self._rows(frame.rounded[WEIGHT]).float()
        n = self.n_compared(*frame.values.shape)
        # Where only codes are written, the scales are those that were read.
        return self._decoded(rows, n, {**stored, **frame.rounded}, frame.values)

    def _decoded(
        self, rows: Tile, n: int, parts: Mapping[str, torch.Tensor], like: torch.Tensor
    ) -> torch.Tensor:
        """Return the first rows of a tile, decoded from its parts: float32 ``[n, columns]``."""
        codec = CODECS[self._target.codec]
        first, own = beginning_of(codec, rows, n, parts, self._target)
        values = like.new_empty(first.end - first.start, like.shape[1])
        codec.decode(first, own, values, self._target)
        return values[:n]

    def _rows(self, values: torch.Tensor) -> torch.Tensor:
        return values[: self.n_compared(*values.shape)]

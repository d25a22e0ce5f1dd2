"""A few rows before and after the merge: how much of the delta the stored dtype kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.codecs import CODECS
from lora_merge.core.tensor import Survival
from lora_merge.core.weight import WEIGHT

if TYPE_CHECKING:
    import torch

    from lora_merge.core.plan import Merge
    from lora_merge.core.weight import Tile
    from lora_merge.merging.worker.workbench import Frame

SAMPLE_ELEMENTS = 1 << 14
"""At most so many elements of each merged tensor are compared."""


class Sample:
    """The first rows of the middle tile of a tensor, kept as they were before the merge.

    Nothing waits for the device until `survival` is called. A tensor whose rows are trained one by one has no sample,
    which would miss those rows.

    Args:
        op: what is done to the tensor.
        n_tiles: in how many tiles.
    """

    def __init__(self, op: Merge, n_tiles: int) -> None:
        self._target = op.target
        # -1 is no tile's number.
        self._tile = n_tiles // 2 if any(not delta.facts.replaces_rows for delta in op.deltas) else -1
        self._before: torch.Tensor | None = None
        self._found: torch.Tensor | None = None

    def before(self, tile: int, frame: Frame) -> None:
        """Keep the rows of a tile, if it is the middle one."""
        if tile == self._tile:
            self._before = self._rows(frame.values).clone()

    def after(self, tile: int, frame: Frame, rows: Tile) -> None:
        """Compare the wanted change of the rows with the change that will be stored."""
        if tile != self._tile or self._before is None:
            return
        import torch

        wanted = self._rows(frame.values) - self._before
        kept = self._stored(frame, rows) - self._before
        touched, norm = wanted != 0, torch.linalg.vector_norm
        lost = (kept == 0) & touched
        # On the device: reading the numbers here would wait for the GPU in the middle of the loop.
        self._found = torch.stack(
            [norm(self._before), norm(wanted), norm(kept - wanted), touched.sum().float(), lost.sum().float()]
        )

    def survival(self) -> Survival | None:
        """Return the norms of weight, delta and rounding error in these rows, and the share of values that did not
        change; None where nothing was sampled.
        """
        if self._found is None:
            return None
        weight, delta, error, n_touched, n_lost = self._found.tolist()
        return Survival(weight, delta, error, unchanged=n_lost / n_touched if n_touched else 0.0)

    def _stored(self, frame: Frame, rows: Tile) -> torch.Tensor:
        """Return the rows as they will be read from the output, float32."""
        import torch

        if self._target.is_dense:
            return self._rows(frame.rounded[WEIGHT]).float()
        whole = torch.empty_like(frame.values)
        CODECS[self._target.codec].decode(rows, frame.rounded, whole, self._target)
        return self._rows(whole)

    @staticmethod
    def _rows(values: torch.Tensor) -> torch.Tensor:
        n_rows, n_columns = values.shape
        return values[: max(1, min(n_rows, SAMPLE_ELEMENTS // max(n_columns, 1)))]

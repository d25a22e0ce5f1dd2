"""Is the adapter's effect on some rows what is recorded? Told without torch, where it surely is.

With A's rows of length 1 and their products G = AAᵀ = VDVᵀ, an orthonormal basis of the row space is Q = D^-½ Vᵀ A, so ``e Qᵀ = (e Aᵀ) V
D^-½`` takes no decomposition of A itself. Its relative error is about 2⁻⁵³ times the condition of G. What is asked is what
`lora_merge.checks.effect` asks.
"""

from __future__ import annotations

from math import isfinite, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_merge.checks.effect_norms import Norms, Sums, share_of
from lora_merge.runtime.shortage import BLAS_BYTES, need_room

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from lora_merge.checks.reading import Reader
    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.plan import Merge
    from lora_merge.core.tensor import Survival
    from lora_merge.core.weight import Weight

    Wide = np.ndarray[Any, np.dtype[np.float64]]

_CONDITION = 1e-8
"""The smallest eigenvalue of G, by its largest, with which the effect is computed here."""

_NARROW = 16
"""Inputs for each direction below which the formulas are asked, see `lora_merge.checks.effect`."""


class Factor(NamedTuple):
    """A of a product, and the sizes of its values: float64 ``[r, in]``."""

    a: Wide
    sizes: Wide

    @classmethod
    def of(cls, reader: Reader, delta: PlacedDelta) -> Factor | None:
        """Return A of a plain product; None where its file is pickled.

        Args:
            reader: of all files.
            delta: for which `lora_merge.checks.expecting.is_plain_product` is true.
        """
        import numpy as np

        ref = delta.factors["A"]
        found = reader.floats_source(ref, range(ref.shape[0]), ref.shape[0])
        if found is None:
            return None
        wide = found.astype(np.float64)
        return cls(wide, np.abs(wide))


class Kept:
    """What rounding does to the effect on the rows of one weight.

    Args:
        seeing: an orthonormal basis of A's rows as columns, float64 ``[in, r]``.
        is_adapter: whether the rounding is to keep the effect.
    """

    def __init__(self, seeing: Wide, *, is_adapter: bool) -> None:
        self._seeing, self._is_adapter = seeing, is_adapter
        self._sums, self._beyond = Sums(), 0.0
        self._is_asked, self._n_others = False, 0

    @classmethod
    def of(cls, right: Wide, *, is_adapter: bool) -> Kept | None:
        """Return the same for A; None where that is not exact enough, or where A sees a good part of all directions."""
        import numpy as np

        with np.errstate(all="ignore"):
            seeing = _seeing(right)
        return None if seeing is None else cls(seeing, is_adapter=is_adapter)

    def add(
        self, change: Wide, error: Wide, others: Callable[[], tuple[Wide, Wide]], beyond: float = 0.0
    ) -> None:
        """Look at some rows.

        Args:
            change: what is added to them, ``[rows, columns]``; all of it is in the row space.
            error: what rounding adds to that.
            others: returns what the nearest numbers would add, of all values, and of those alone that have numbers on both sides. It is
                asked from the first rows on for which that may have to be known.
            beyond: the squares of the distances of values from the last numbers of a grid, those beyond them.
        """
        import numpy as np

        sums, share = self._sums, share_of(*self._seeing.shape)
        found, size = self._seen(error), float(np.vdot(change, change))
        self._is_asked |= not Norms.of(Sums(error=found, effect=size)).is_much_less(sqrt(beyond))
        if self._is_adapter and self._is_asked:
            nearest, within = others()
            lost = self._seen(nearest)
            sums.nearest += lost
            sums.within += lost if within is nearest else self._seen(within)
            self._n_others += len(change)
        sums.error += found
        sums.effect += size
        # At least by so much float32 may have missed what is recorded.
        sums.error_off += share**2 * float(np.vdot(error, error))
        sums.effect_off += share**2 * size
        sums.n_rows += len(change)
        self._beyond += beyond

    def _seen(self, error: Wide) -> float:
        """Return the square of what is seen of an error."""
        import numpy as np

        need_room(BLAS_BYTES, "multiply matrices")
        return float(np.square(error @ self._seeing).sum())

    def is_as_recorded(self, record: Survival, n_rows: int) -> bool:
        """Return True where the effect on the rows is what is recorded of all; False where that is not known.

        Args:
            record: what the merge recorded.
            n_rows: of the whole weight.
        """
        norms = Norms.of(self._sums)
        if record.effect_norm < 0:
            return False
        if not isfinite(norms.error + norms.effect):
            return False
        if norms.against(record, self._sums, n_rows, is_whole=self._sums.n_rows == n_rows):
            return False
        if not self._is_adapter or norms.is_much_less(sqrt(self._beyond)):
            return True
        return self._n_others == self._sums.n_rows and norms.is_surely_kept()


class ProductRows:
    """The rows of one merged weight, to which one product is added: what its kinds have in common.

    Args:
        reader: of all files.
        op: what was done to it, for which `applies` of the kind is true.
        written: the weight as it is in the output.
    """

    def __init__(self, reader: Reader, op: Merge, written: Weight) -> None:
        self._reader, self._op, self._written = reader, op, written
        self._is_adapter = op.rounding is not None
        # Nothing is recorded of the nearest numbers of a plain dtype.
        self._is_accounted = self._is_adapter or not op.target.is_dense
        self._factor: Factor | None = None
        self._kept: Kept | None = None

    def are_as_recorded(self, record: Survival | None) -> bool:
        """Return True where the adapter's effect on the rows that were asked is what is recorded of all, if anything is to be."""
        if not self._is_accounted:
            return True
        if record is None or self._kept is None:
            return False
        return self._kept.is_as_recorded(record, self._op.view.n_rows)

    def _is_ready(self) -> bool:
        """Read A, once; return False where nothing can be told with it."""
        if self._factor is None:
            self._factor = Factor.of(self._reader, self._op.deltas[0])
            if self._factor is not None and self._is_accounted:
                self._kept = Kept.of(self._factor.a, is_adapter=self._is_adapter)
        return self._factor is not None and (self._kept is not None or not self._is_accounted)


def _seeing(right: Wide) -> Wide | None:
    """Return ``Aᵀ V D^-½`` of A's rows at length 1: float64 ``[in, r]``, an orthonormal basis of them as columns. None where that is not
    exact enough, or where A sees a good part of all directions.
    """
    import numpy as np

    rank, n_inputs = right.shape
    lengths = np.sqrt(np.square(right).sum(1))
    if rank * _NARROW > n_inputs or not np.isfinite(lengths).all() or not lengths.all():
        return None
    need_room(BLAS_BYTES, "multiply matrices")
    rows = right / lengths[:, None]
    values, vectors = np.linalg.eigh(rows @ rows.T)
    if not values[0] > _CONDITION * values[-1]:
        return None
    found: Wide = rows.T @ (vectors / np.sqrt(values))
    return found

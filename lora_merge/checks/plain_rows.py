"""Rows of the most frequent merges, recomputed without torch: one product added to plain values, each rounded to the nearest number or for
the adapter.

It says yes, or that it does not know. Then `lora_merge.checks.recompute` asks its formulas, and says what is wrong. The limits are
those of `lora_merge.checks.formulas` and `lora_merge.checks.bounds`: what float32 computes is off by an error that is known, and the
stored value is one of those that lie between both ends, rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.checks.bounds import REACH
from lora_merge.checks.expecting import is_one_product
from lora_merge.checks.kept import Factor, ProductRows
from lora_merge.checks.rounding import PRECISION, SMALLEST
from lora_merge.core.weight import WEIGHT
from lora_merge.runtime.shortage import BLAS_BYTES, need_room

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from lora_merge.core.plan import Merge

    Wide = np.ndarray[Any, np.dtype[np.float64]]

_FLOAT32 = 2.0**-24
_UNDERFLOW = 2.0**-149
"""As in `lora_merge.checks.formulas`."""


class PlainRows(ProductRows):
    """The rows of one merged weight of a plain dtype."""

    @staticmethod
    def applies(op: Merge) -> bool:
        """Return whether the rows of a weight can be recomputed here."""
        return (
            op.source.plain is not None
            and op.target.is_dense
            and op.target.dtype in PRECISION
            and is_one_product(op)
        )

    def are_explained(self, rows: Sequence[int]) -> bool:
        """Return True where rounding explains every stored value of some rows; False where that is not known."""
        import numpy as np

        op, reader, n_rows = self._op, self._reader, self._op.view.n_rows
        (delta,) = op.deltas
        source, dtype = op.source.plain, op.target.dtype
        assert source is not None
        before = reader.floats_source(source, rows, n_rows)
        stored = reader.floats_rows(self._written.parts[WEIGHT], rows, n_rows)
        left = reader.floats_source(delta.factors["B"], rows, n_rows)
        if before is None or stored is None or left is None or not self._is_ready():
            return False
        assert self._factor is not None
        # What is not finite is not explained.
        with np.errstate(all="ignore"):
            exact, off, change = changed(
                before.astype(np.float64), left.astype(np.float64), self._factor, delta.effective_scale
            )
            ends = exact - off, exact + off
            if self._kept is not None:
                # As far as rounding for the adapter may move a value.
                reach = REACH * np.maximum(*(step(end, dtype) for end in ends))
                ends = ends[0] - reach, ends[1] + reach
                self._kept.add(change, stored - exact, lambda: (rounded(exact, dtype) - exact,) * 2)
            low, high = (rounded(end, dtype) for end in ends)
            return bool(((low <= stored) & (stored <= high)).all())


def changed(before: Wide, left: Wide, right: Factor, scale: float) -> tuple[Wide, Wide, Wide]:
    """Return W + s · BA, by how much float32 may have missed it, and s · BA.

    The product is off by (r + 5)·2⁻²⁴·|s|·Σ|bᵢaᵢ| at most, and by its underflows; the sum by 2⁻²⁴ of the sizes of its parts.

    Args:
        before: W, ``[rows, in]``.
        left: rows of B.
        right: A.
        scale: s.
    """
    import numpy as np

    a, sizes = right
    need_room(BLAS_BYTES, "multiply matrices")
    change = (left @ a) * scale
    reach = np.abs(left) @ sizes
    # B may have underflowed where the scale was multiplied into it first.
    reach += _UNDERFLOW / _FLOAT32 * sizes.sum(0)
    off = reach * ((len(a) + 5) * _FLOAT32 * abs(scale))
    off += (abs(scale) * len(a) + 2) * _UNDERFLOW
    off += (np.abs(before) + np.abs(change)) * _FLOAT32
    return before + change, off, change


def rounded(values: Wide, dtype: str) -> Wide:
    """Return float64 values rounded to the nearest number of a dtype, ties to even, still in float64; see
    `lora_merge.checks.rounding`.
    """
    import numpy as np

    steps = step(values, dtype)
    found: Wide = np.rint(values / steps) * steps
    return found


def step(values: Wide, dtype: str) -> Wide:
    """Return the distance of the two numbers of a dtype around each value, see `lora_merge.checks.rounding`."""
    import numpy as np

    # The exponent of each value, from its bits.
    exponents = (values.view(np.int64) >> 52) & ((1 << 11) - 1)
    exponents = np.maximum(exponents - (PRECISION[dtype] - 1), SMALLEST[dtype] + 1023)
    found: Wide = (exponents << 52).view(np.float64)
    return found

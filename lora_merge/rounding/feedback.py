"""How strongly errors are fed back, column by column, and how many columns are decided at the same time: worked out in NumPy, so that
merges without torch have the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_merge.runtime.shortage import BLAS_BYTES, need_room

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np

    Numbers = np.ndarray[Any, np.dtype[np.float32]]
    Wide = np.ndarray[Any, np.dtype[np.float64]]
    Sizes = np.ndarray[Any, np.dtype[np.int32]]

_BAND = 1 << 22
"""Values of a band, about."""

PANEL = 128
"""Columns that are transposed at a time: with 1024 lines, their buffers are in a processor's second cache."""

_AGAIN = 16
"""Columns that are decided again, for each direction: with fewer, some directions have no column that could help."""

_MOST = 1 << 21
"""Values of a band that are decided again at most: they are in memory together."""

_TAPER = 0.25
"""λ of a column is at most this share of what the columns after it have of the basis."""

_SWEEPS = (0.2, 0.05)
"""λ of each sweep over the last columns, in units of the mean of ‖q‖²."""

_MUTUAL = 1.0
"""By how much the corrections of a block's columns may add up at most, see `_sizes`."""


def band_rows(columns: int) -> int:
    """Return the lines of a band: a power of two between 64 and 2048, about 2^22 values.

    Example:
        >>> band_rows(128), band_rows(4096), band_rows(14336), band_rows(1 << 20)
        (2048, 1024, 256, 64)
    """
    lines = max(_BAND // max(columns, 1), 1)
    return min(max(1 << (lines.bit_length() - 1), 64), 2048)


def last_panel(rank: int, columns: int) -> int:
    """Return how many of the columns are the last panel, whose columns are decided again."""
    again = min(columns, max(PANEL, min(_AGAIN * rank, _MOST // band_rows(columns))))
    return columns - (columns - again) // PANEL * PANEL


class FlatSweep(NamedTuple):
    """How the last columns are decided again, as compiled code reads it."""

    sizes: Sizes
    """Of the blocks."""

    pulls: Numbers
    """``[columns, r]``."""

    shares: Numbers
    """``[columns]``."""


class Flat(NamedTuple):
    """Feedback as compiled code reads it: see `Columns`."""

    sizes: Sizes
    """Of the blocks of all columns."""

    pulls: Numbers | None
    """``[in, r]``; None where nothing is fed back."""

    pushes: Numbers
    """``[in, r]``."""

    again: int
    """The first column that is decided again."""

    sweeps: tuple[FlatSweep, ...]


class Columns(NamedTuple):
    """How some adjacent columns are decided."""

    sizes: tuple[int, ...]
    """Columns of each block: those of a block are decided at the same time."""

    pulls: Numbers
    """By how much an error shifts the values: q / (λ + q·q) of each column, ``[columns, r]``."""

    shares: Numbers
    """q·q / (λ + q·q) of each column."""


@dataclass(frozen=True, eq=False)
class Feedback:
    """How all columns of a matrix are decided."""

    basis: Numbers
    """Of the adapter's row space, orthonormal, ``[r, in]``: what an error of a value adds to the error of its row."""

    columns: Columns | None
    """None where nothing is fed back."""

    again: tuple[Columns, ...]
    """How the columns of the last panel are decided again, each time given all others."""

    before: int
    """Columns that are decided once."""

    @cached_property
    def flat(self) -> Flat:
        """The same as compiled code reads it."""
        import numpy as np

        pulls = None if self.columns is None else self.columns.pulls
        sizes = _even_sizes(self.basis.shape[1]) if self.columns is None else self.columns.sizes
        sweeps = tuple(FlatSweep(_int32(one.sizes), one.pulls, one.shares) for one in self.again)
        return Flat(_int32(sizes), pulls, np.ascontiguousarray(self.basis.T), self.before, sweeps)


def feedback_of(basis: Numbers, damping: float) -> Feedback:
    """Return the feedback for a basis.

    λ is ``damping``, but where few columns are left the error has to be gone soon: λ falls with the share of the basis that
    is still to come. So most columns have the little noise of a large λ, and what is left at the end is that of a small one.

    Args:
        basis: as `Feedback` has it.
        damping: λ, see `damping_for`.
    """
    import numpy as np

    rank, n_columns = basis.shape
    squares = np.square(basis, dtype=np.float64).sum(0)
    mean = rank / n_columns
    to_come = (squares.sum() - squares.cumsum()) / rank
    # Not below the last sweep's: no column is to come after the last, and its λ must not be 0.
    each = np.maximum(np.minimum(to_come * _TAPER, damping), _SWEEPS[-1] * mean)
    before = n_columns - last_panel(rank, n_columns)
    columns = _columns(basis, squares, each)
    # The first sweep makes less noise of it, which only shows where the last columns are many of all.
    shares = _SWEEPS if 8 * (n_columns - before) > n_columns else _SWEEPS[-1:]
    again = tuple(_columns(basis[:, before:], squares[before:], share * mean) for share in shares)
    return Feedback(basis, columns, again, before)


def no_feedback(basis: Numbers) -> Feedback:
    """Return the feedback that decides each column alone: only what is seen of the error is summed up, for which blocks may have
    any size.

    Args:
        basis: as `Feedback` has it.
    """
    return Feedback(basis, None, (), basis.shape[1])


def _columns(basis: Numbers, squares: Wide, damping: Wide | float) -> Columns:
    """Return how some adjacent columns are decided, given q, q·q and λ of each."""
    import numpy as np

    shares = squares / (squares + damping)
    pulls = np.ascontiguousarray((basis / (squares + damping)).T, dtype=np.float32)
    return Columns(_sizes(basis, pulls), pulls, shares.astype(np.float32))


def _int32(sizes: Iterable[int]) -> Sizes:
    import numpy as np

    return np.array(tuple(sizes), dtype=np.int32)


def _even_sizes(n_columns: int) -> Iterator[int]:
    """Yield the sizes of blocks that are as large as compiled code takes."""
    block = PANEL // 2
    return (min(block, n_columns - first) for first in range(0, n_columns, block))


def _sizes(basis: Numbers, pulls: Numbers) -> tuple[int, ...]:
    """Return the sizes of blocks of adjacent columns: powers of two, none of which goes from one panel into the next.

    Each column corrects what it sees of the error, as if the others of its block did not. What column j does of the work of
    column i is q_i·q_j / (λ_j + q_j·q_j). A block is so small that all these together, i ≠ j, have a Frobenius norm of at most
    `_MUTUAL`: then the error cannot grow by being corrected too often.
    """
    import numpy as np

    rank, n = len(basis), len(pulls)
    most = PANEL // 2
    padded = -n % most
    left = np.pad(pulls, ((0, padded), (0, 0))).reshape(-1, most, rank)
    right = np.pad(basis, ((0, 0), (0, padded))).reshape(rank, -1, most).transpose(1, 0, 2)
    need_room(BLAS_BYTES, "multiply matrices")
    mutual = np.square(left @ right)
    mutual[:, np.arange(most), np.arange(most)] = 0
    n_chunks = len(mutual)
    sizes = np.ones(n_chunks, dtype=np.int64)
    size = 2
    while size <= most:
        blocks = mutual.reshape(n_chunks, most // size, size, most // size, size)
        own = np.einsum("ckikj->ck", blocks)
        # All blocks of a chunk have one size: the largest at which none adds up to more.
        sizes[own.max(1) <= _MUTUAL**2] = size
        size *= 2
    return tuple(_cut((size for size in sizes.tolist() for _ in range(most // size)), n))


def _cut(sizes: Iterable[int], total: int) -> Iterator[int]:
    """Yield sizes until they come to a total."""
    for size in sizes:
        if total <= 0:
            return
        yield min(size, total)
        total -= size


def damping_for(rank: int, columns: int) -> float:
    """Return λ for a matrix: 0.6 √(r / in), between 0.01 and 0.2. It makes the least noise.

    How much of the adapter is lost hardly depends on it, as λ falls towards the last columns anyway: with λ from 1 to 64 times
    r / in the lost share was the same within a tenth, on bf16, INT4 and NVFP4, whether a step is 1, 5 or 20 times as large as
    the change. The noise is least near this λ, for all of these: a smaller one moves values too often, a larger one too
    late. Tried for ``in`` from 128 to 14336 and r from 4 to 128.

    Example:
        >>> damping_for(16, 4096), damping_for(8, 128)
        (0.0375, 0.15)
    """
    return min(max(0.6 * sqrt(rank / columns), 0.01), 0.2)

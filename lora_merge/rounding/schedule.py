"""How strongly the error is fed back, column by column; and how many columns are decided at the same time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch  # noqa: TC004 - a field's type, never evaluated

_BAND = 1 << 22
"""Values of a band, about."""

_PANEL = 128
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
    again = min(columns, max(_PANEL, min(_AGAIN * rank, _MOST // band_rows(columns))))
    return columns - (columns - again) // _PANEL * _PANEL


class Steps(NamedTuple):
    """How some adjacent columns are decided, in blocks: the columns of a block at the same time."""

    sizes: tuple[int, ...]
    """Columns of each block."""

    pulls: tuple[torch.Tensor, ...]
    """By how much an error shifts the values: q / (λ + q·q) of each column, float32 ``[columns, r]``."""

    pushes: tuple[torch.Tensor, ...]
    """What an error of a value adds to the error of its row: q of each column, float32 ``[r, columns]``."""

    shares: torch.Tensor
    """q·q / (λ + q·q) of all columns, float32 ``[columns, 1]``."""


class FlatSweep(NamedTuple):
    """`Steps` that decide the last columns again, as compiled code reads them."""

    sizes: torch.Tensor
    """Int32, of the blocks."""

    pulls: torch.Tensor
    """Float32 ``[columns, r]``."""

    shares: torch.Tensor
    """Float32 ``[columns]``."""


class Flat(NamedTuple):
    """A schedule as compiled code reads it: see `Steps`."""

    sizes: torch.Tensor
    """Int32, of the blocks of all columns."""

    pulls: torch.Tensor | None
    """Float32 ``[in, r]``; None where nothing is fed back."""

    pushes: torch.Tensor
    """Float32 ``[in, r]``."""

    again: int
    """The first column that is decided again."""

    sweeps: tuple[FlatSweep, ...]


class _Columns(NamedTuple):
    """How some adjacent columns are decided: `Steps` before they are cut into blocks."""

    sizes: tuple[int, ...]
    pulls: torch.Tensor
    """Float32 ``[columns, r]``."""

    shares: torch.Tensor
    """Float32 ``[columns]``."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """How all columns of a matrix are decided. Torch and compiled code need different forms of it, which are made when they are
    needed: to cut it into blocks takes longer than all else.
    """

    basis: torch.Tensor
    """Of the adapter's row space, orthonormal, float32 ``[r, in]``."""

    columns: _Columns | None
    """None where nothing is fed back."""

    again: tuple[_Columns, ...]
    """How the columns of the last panel are decided again, each time given all others."""

    before: int
    """Columns that are decided once."""

    @cached_property
    def panels(self) -> tuple[Steps, ...]:
        """The columns in their order."""
        assert self.columns is not None, "nothing is fed back"
        return tuple(_panels(_steps(self.basis, self.columns), self.before))

    @cached_property
    def sweeps(self) -> tuple[Steps, ...]:
        """How the columns of the last panel are decided again."""
        last = self.basis[:, self.before :]
        return tuple(_steps(last, columns) for columns in self.again)

    @cached_property
    def flat(self) -> Flat:
        """The same as compiled code reads it."""
        pulls = None if self.columns is None else self.columns.pulls
        sizes = _even_sizes(self.basis.shape[1]) if self.columns is None else self.columns.sizes
        sweeps = tuple(FlatSweep(_int32(one.sizes), one.pulls, one.shares) for one in self.again)
        return Flat(_int32(sizes), pulls, self.basis.t().contiguous(), self.before, sweeps)


def schedule_of(basis: torch.Tensor, damping: float) -> Schedule:
    """Return the schedule for a basis.

    λ is ``damping``, but where few columns are left the error has to be gone soon: λ falls with the share of the basis that
    is still to come. So most columns have the little noise of a large λ, and what is left at the end is that of a small one.

    Args:
        basis: as `Schedule` has it.
        damping: λ, see `damping_for`.
    """
    rank, n_columns = basis.shape
    squares = basis.double().square().sum(0)
    mean = rank / n_columns
    to_come = (squares.sum() - squares.cumsum(0)).div_(rank)
    # Not below the last sweep's: no column is to come after the last, and its λ must not be 0.
    each = to_come.mul_(_TAPER).clamp_(max=damping).clamp_(min=_SWEEPS[-1] * mean)
    before = n_columns - last_panel(rank, n_columns)
    columns = _columns(basis, squares, each)
    last = basis[:, before:]
    # The first sweep makes less noise of it, which only shows where the last columns are many of all.
    shares = _SWEEPS if 8 * (n_columns - before) > n_columns else _SWEEPS[-1:]
    again = tuple(_columns(last, squares[before:], squares.new_tensor(share * mean)) for share in shares)
    return Schedule(basis, columns, again, before)


def without_feedback(basis: torch.Tensor) -> Schedule:
    """Return the schedule that decides each column alone: only what is seen of the error is summed up, for which blocks may have
    any size.

    Args:
        basis: as `Schedule` has it.
    """
    return Schedule(basis, None, (), basis.shape[1])


def _columns(basis: torch.Tensor, squares: torch.Tensor, damping: torch.Tensor) -> _Columns:
    """Return how some adjacent columns are decided, given q, q·q and λ of each."""
    shares = squares / (squares + damping)
    pulls = (basis.double() / (squares + damping)).t().float().contiguous()
    return _Columns(_sizes(basis, pulls), pulls, shares.float())


def _steps(basis: torch.Tensor, columns: _Columns) -> Steps:
    sizes, pulls, shares = columns
    return Steps(sizes, pulls.split_with_sizes(sizes), basis.split_with_sizes(sizes, 1), shares.unsqueeze(1))


def _panels(steps: Steps, before: int) -> Iterator[Steps]:
    """Cut the steps of all columns into panels, the last of which begins at column ``before``."""
    n_columns = sum(steps.sizes)
    block = first = 0
    for end in (*range(_PANEL, before + 1, _PANEL), n_columns):
        start, at = block, first
        while at < end:
            at += steps.sizes[block]
            block += 1
        part = slice(start, block)
        yield Steps(steps.sizes[part], steps.pulls[part], steps.pushes[part], steps.shares[first:end])
        first = end


def _int32(sizes: Iterable[int]) -> torch.Tensor:
    import torch

    return torch.tensor(tuple(sizes), dtype=torch.int32)


def _even_sizes(n_columns: int) -> Iterator[int]:
    """Yield the sizes of blocks that are as large as compiled code takes."""
    block = _PANEL // 2
    return (min(block, n_columns - first) for first in range(0, n_columns, block))


def _sizes(basis: torch.Tensor, pulls: torch.Tensor) -> tuple[int, ...]:
    """Return the sizes of blocks of adjacent columns: powers of two, none of which goes from one panel into the next.

    Each column corrects what it sees of the error, as if the others of its block did not. What column j does of the work of
    column i is q_i·q_j / (λ_j + q_j·q_j). A block is so small that all these together, i ≠ j, have a Frobenius norm of at most
    `_MUTUAL`: then the error cannot grow by being corrected too often.
    """
    import torch

    rank, n = len(basis), len(pulls)
    most = _PANEL // 2
    padded = -n % most
    left = torch.nn.functional.pad(pulls, (0, 0, 0, padded)).view(-1, most, rank)
    right = torch.nn.functional.pad(basis, (0, padded)).view(rank, -1, most).permute(1, 0, 2)
    mutual = torch.bmm(left, right).square_()
    mutual.diagonal(dim1=1, dim2=2).zero_()
    n_chunks = len(mutual)
    sizes = torch.ones(n_chunks, dtype=torch.int64, device=basis.device)
    size = 2
    while size <= most:
        blocks = mutual.view(n_chunks, most // size, size, most // size, size).diagonal(dim1=1, dim2=3)
        # All blocks of a chunk have one size: the largest at which none adds up to more.
        sizes[blocks.sum((1, 2)).amax(1) <= _MUTUAL**2] = size
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

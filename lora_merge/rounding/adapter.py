"""Rounding that keeps the adapter: the errors of a row cancel out in the directions in which the adapter acts.

For values v and an orthonormal basis Q of the row space of the adapter's A, levels are chosen column after column to keep
λ‖e‖² + ‖e Qᵀ‖² small, where e = stored - v. This is the error feedback of GPTQ (Frantar et al., 2022) with QᵀQ + λI in place of
the Hessian of calibration data, kept in its low-rank form::

    c = 0
    for each column j:
        q = Q[:, j]
        stored[:, j] = nearest level to v[:, j] - (c @ q) / (λ + q·q)
        c += outer(stored[:, j] - v[:, j], q)

Towards the last columns λ becomes smaller (`lora_merge.rounding.schedule`), and then the last columns are decided again, each
given all others. Rows do not depend on each other. All is done on transposed values, in which a column lies together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.rounding.bands import Band, Panel, band_rows
from lora_merge.rounding.schedule import Schedule

if TYPE_CHECKING:
    import torch  # noqa: TC004 - a field's type, never evaluated

    from lora_merge.codecs.grid import Grid


@dataclass(frozen=True, eq=False)
class Span:
    """The directions of the adapter for some lines of a weight: each expert of a stack has its own."""

    rows: tuple[int, int]
    """The first line, and the one after the last."""

    basis: torch.Tensor
    """Float32 ``[r, in]``, orthonormal."""


def round_adapter(
    values: torch.Tensor, grid: Grid, basis: torch.Tensor, damping: float, *, along: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a level for each value, so that the error vanishes on the row space of the adapter.

    The result is the same whether the lines of a matrix come in one call or in several, if each begins at a multiple of
    `band_rows`.

    Args:
        values: what is to be stored.
        grid: of these lines.
        basis: of the adapter's row space, orthonormal.
        damping: λ, see `damping_for`.
        along: the weight is stored ``[in, out]``: the sequence runs over the lines, which must be all lines of a matrix.

    Shapes:
        values: float32 ``[lines, in]``, along: ``[in, out]``; basis: float32 ``[r, in]``.

    Returns:
        The levels, in the shape of the values, and the error ``(stored - values) Qᵀ``, float32 ``[lines, r]`` (along: ``[out,
        r]``), both newly allocated.
    """
    import torch

    n_rows, n_columns = values.shape[::-1] if along else values.shape
    levels = torch.empty_like(values, memory_format=torch.contiguous_format)
    error = values.new_zeros((n_rows, len(basis)))
    schedule = Schedule.of(basis, damping)
    size = band_rows(n_columns)
    for start in range(0, n_rows, size):
        end = min(start + size, n_rows)
        total = _round_band(Band(values, grid, (start, end), along=along), schedule, levels)
        error[start:end] = total[:, : end - start].t()
    return levels, error


def _round_band(band: Band, schedule: Schedule, levels: torch.Tensor) -> torch.Tensor:
    """Round a band into its place among the levels; return its error, float32 ``[r, width]``."""
    total = schedule.basis.new_zeros((len(schedule.basis), band.width))
    first = 0
    for panel in band.panels(levels, schedule.panels):
        n = len(panel.numbers)
        _decide(panel, schedule, first, total)
        if first + n == schedule.n_columns:
            for sweep in schedule.sweeps:
                _decide_again(panel, schedule.basis[:, first:], sweep, total)
        first += n
    return total


def _decide(panel: Panel, schedule: Schedule, first: int, total: torch.Tensor) -> None:
    """Choose the levels of a panel, a block of columns at a time, and add their errors to the total."""
    import torch

    at = 0
    for size in schedule.blocks(first, len(panel.numbers)):
        pull, push = (
            schedule.pulls[first + at : first + at + size],
            schedule.basis[:, first + at : first + at + size],
        )
        numbers, chosen, scale = (
            panel.numbers[at : at + size],
            panel.levels[at : at + size],
            panel.scale_of(at, size),
        )
        shift = torch.mm(pull, total, out=panel.shift[:size])
        if scale is not None:
            shift.div_(scale)
        panel.cap_(shift, at)
        panel.lattice.nearest_(torch.sub(numbers, shift, out=chosen))
        miss = torch.sub(chosen, numbers, out=shift)
        if scale is not None:
            miss.mul_(scale)
        total.addmm_(push, miss)
        at += size


def _decide_again(panel: Panel, basis: torch.Tensor, damping: float, total: torch.Tensor) -> None:
    """Choose the levels of a panel again, one column after the other: the best of each, given all others.

    Shapes:
        basis: float32 ``[r, columns]``, of the panel's columns.
    """
    import torch

    squares = basis.square().sum(0)
    pulls = (basis / (squares + damping)).t().contiguous()
    shares = (squares / (squares + damping)).tolist()
    for at in range(len(panel.numbers)):
        numbers, chosen, scale = panel.numbers[at : at + 1], panel.levels[at : at + 1], panel.scale_of(at, 1)
        shift = torch.mm(pulls[at : at + 1], total, out=panel.shift[:1])
        if scale is not None:
            shift.div_(scale)
        # The total has this column's own error in it, which the new level replaces.
        shift.sub_(torch.sub(chosen, numbers, out=panel.other), alpha=shares[at])
        panel.cap_(shift, at)
        new = panel.lattice.nearest_(torch.sub(numbers, shift, out=panel.other))
        change = torch.sub(new, chosen, out=shift)
        chosen.copy_(new)
        if scale is not None:
            change.mul_(scale)
        total.addmm_(basis[:, at : at + 1], change)

"""Rounding that keeps the adapter: the errors of a row cancel out in the directions in which the adapter acts.

For values v and an orthonormal basis Q of the row space of the adapter's A, the levels are chosen column after column to keep
λ‖e‖² + ‖e Qᵀ‖² small, where e = stored - v. This is the error feedback of GPTQ (Frantar et al., 2022) with QᵀQ + λI in place of
the Hessian of calibration data, kept in its low-rank form::

    c = 0
    for each column j:
        q = Q[:, j]
        stored[:, j] = nearest level to v[:, j] - (c @ q) / (λ + q·q)
        c += outer(stored[:, j] - v[:, j], q)

Rows do not depend on each other. A few columns (a block) are decided at the same time, see `_block_of`. All is done on
transposed values, in which a column lies together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.rounding.bands import Band, band_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch  # noqa: TC004 - a field's type, never evaluated

    from lora_merge.codecs.grid import Grid


@dataclass(frozen=True, eq=False)
class Span:
    """The directions of the adapter for some lines of a weight: one expert of a stack has a basis of its own."""

    rows: tuple[int, int]
    """The first line, and the one after the last."""

    basis: torch.Tensor
    """Float32 ``[r, in]``, orthonormal."""


def round_adapter(
    values: torch.Tensor,
    grid: Grid,
    basis: torch.Tensor,
    damping: float | Sequence[float],
    *,
    along: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a level for each value, such that the error vanishes on the row space of the adapter.

    Done in bands of `band_rows` lines, so the same whether the lines of a matrix come in one call or in several that begin
    at multiples of it.

    Args:
        values: what is to be stored.
        grid: of these lines.
        basis: of the adapter's row space, orthonormal.
        damping: λ, the weight of ordinary rounding noise; one for all lines, or one for each band (see `damping_for`).
        along: the weight is stored ``[in, out]``: the sequence runs over the lines, which must be all lines of a matrix.
            Its bands are bands of columns.

    Shapes:
        values: float32 ``[lines, in]``; basis: float32 ``[r, in]``; along: ``[in, out]`` and ``[r, in]``.

    Returns:
        The levels, in the shape of the values, and the error ``(stored - values) Qᵀ``, float32 ``[lines, r]`` (along: ``[out,
        r]``), both newly allocated.
    """
    import torch

    n_rows, n_columns = values.shape[::-1] if along else values.shape
    levels = torch.empty_like(values, memory_format=torch.contiguous_format)
    error = values.new_zeros((n_rows, len(basis)))
    size = band_rows(n_columns)
    for number, start in enumerate(range(0, n_rows, size)):
        each = damping if isinstance(damping, float | int) else damping[number]
        band = Band(values, grid, (start, min(start + size, n_rows)), along=along)
        _round_band(band, levels, error, basis, each)
    return levels, error


def _round_band(
    band: Band, levels: torch.Tensor, error: torch.Tensor, basis: torch.Tensor, damping: float
) -> None:
    import torch

    rank, n_columns = basis.shape
    size = _block_of(rank, n_columns, damping)
    weights = (basis / (basis.square().sum(0) + damping)).t().contiguous()
    pulls, pushes = weights.split(size), basis.split(size, dim=1)
    total = basis.new_zeros((rank, band.width))
    shift, miss = basis.new_empty((2, size, band.width))
    block = 0
    for panel in band.panels(levels, size):
        for k in range(panel.n_blocks):
            numbers, chosen, scale = panel.numbers[k], panel.levels[k], panel.scales[k]
            if len(numbers) < size:
                shift, miss = shift[: len(numbers)], miss[: len(numbers)]
            torch.mm(pulls[block], total, out=shift)
            if scale is not None:
                shift.div_(scale)
            panel.cap_(shift, k)
            band.lattice.nearest_(torch.sub(numbers, shift, out=chosen))
            torch.sub(chosen, numbers, out=miss)
            if scale is not None:
                miss.mul_(scale)
            total.addmm_(pushes[block], miss)
            block += 1
    first, last = band.rows
    error[first:last] = total[:, : last - first].t()


def _block_of(rank: int, n_columns: int, damping: float) -> int:
    return 16

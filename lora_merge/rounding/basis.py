"""The row space of LoRA factors: the directions of the input in which an adapter has an effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

_KEPT = 1e-6
"""Singular values below this share of the largest are dropped: factors stored in bfloat16 or float32 have no more digits."""


def row_space(factors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return an orthonormal basis of all rows of some factors, float32 ``[r, in]``; None where all are zero.

    Computed in float64 on the CPU. Every row is scaled to length 1 first, so that a small adapter beside a large one keeps
    its directions.

    Shapes:
        factors: A of each delta, floats ``[r_i, in]``.
    """
    import torch

    if not factors:
        return None
    rows = torch.cat([factor.detach().to("cpu", torch.float64) for factor in factors])
    lengths = rows.norm(dim=1, keepdim=True)
    rows = (rows / lengths)[(lengths > 0).squeeze(1)]
    if not len(rows):
        return None
    return _basis(rows).float().contiguous()


def _basis(rows: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis of some rows, float64 ``[r, in]``."""
    import torch

    if rows.shape[0] <= rows.shape[1]:
        # A fourth of the time of singular vectors, which are only needed where some are dropped.
        columns: torch.Tensor
        columns, triangle = torch.linalg.qr(rows.t())
        sizes = torch.linalg.svdvals(triangle)
        if sizes[-1] > _KEPT * sizes[0]:
            return columns.t()
    basis: torch.Tensor
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[sizes > _KEPT * sizes[0]]

"""The row space of LoRA factors: the directions of the input in which an adapter has an effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.runtime.shortage import BLAS_BYTES, need_room

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch

    Numbers = np.ndarray[Any, np.dtype[np.float32]]
    Wide = np.ndarray[Any, np.dtype[np.float64]]

_KEPT = 1e-6
"""Singular values below this share of the largest are dropped: factors stored in bfloat16 or float32 have no more digits."""


def row_space(factors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return an orthonormal basis of all rows of some factors, float32 ``[r, in]``, where they are; None where all are zero.

    Shapes:
        factors: A of each delta, floats ``[r_i, in]``.
    """
    import torch

    found = row_space_of([factor.detach().float().cpu().numpy() for factor in factors])
    return None if found is None else torch.from_numpy(found).to(factors[0].device)


def row_space_of(factors: Sequence[Numbers]) -> Numbers | None:
    """Return the same of arrays. It is computed in float64; every row is scaled to length 1 first, so that a small adapter beside a
    large one keeps its directions.
    """
    import numpy as np

    if not factors:
        return None
    rows = np.concatenate([factor.astype(np.float64) for factor in factors])
    lengths = np.sqrt(np.square(rows).sum(1))
    rows = rows[lengths > 0] / lengths[lengths > 0, None]
    return np.ascontiguousarray(_basis(rows), dtype=np.float32) if len(rows) else None


def _basis(rows: Wide) -> Wide:
    """Return an orthonormal basis of some rows, float64 ``[r, in]``."""
    import numpy as np

    need_room(BLAS_BYTES, "find a row space")
    basis: Wide
    if rows.shape[0] <= rows.shape[1]:
        # A fourth of the time of singular vectors, which are only needed where some are dropped.
        columns, triangle = np.linalg.qr(rows.T)
        sizes = np.linalg.svd(triangle, compute_uv=False)
        if sizes[-1] > _KEPT * sizes[0]:
            basis = columns.T
            return basis
    _, sizes, basis = np.linalg.svd(rows, full_matrices=False)
    basis = basis[sizes > _KEPT * sizes[0]]
    return basis

"""Truncates factors to a lower rank: the largest singular values of their product, without the product."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lora_merge.conversion.transforms.pair import Pair

if TYPE_CHECKING:
    import torch

    from lora_merge.conversion.lora import Keep


class ReduceRank:
    """ΔW ← the nearest matrix of a lower rank, in the Frobenius and the spectral norm.

    Factors that need no truncation stay as they are.

    Args:
        keep: how much is kept.

    Reference:
        Eckart and Young, 1936, https://doi.org/10.1007/BF02288367.
    """

    exact: ClassVar[bool] = False

    def __init__(self, keep: Keep) -> None:
        self._keep = keep

    def __call__(self, pair: Pair) -> Pair:
        """Return truncated factors of scale 1; each has the square roots of the singular values."""
        import torch

        if self._keep.energy is None and pair.rank <= (self._keep.rank or 0):
            return pair
        # B = Q R and Aᵀ = Q′ R′ with orthonormal Q and Q′, so the singular values of B A are those of the
        # small R R′ᵀ.
        q_b, r_b = torch.linalg.qr(pair.b * pair.scale)
        q_a, r_a = torch.linalg.qr(pair.a.mT)
        u, sigma, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        rank = rank_of(sigma, self._keep)
        if rank >= pair.rank:
            return pair
        # Split evenly, so that A and B have values of similar size.
        root = sigma[..., :rank].sqrt()
        b = (q_b @ u[..., :rank]) * root[..., None, :]
        a = (v[..., :rank, :] @ q_a.mT) * root[..., None]
        return Pair(a.contiguous(), b.contiguous())


def rank_of(sigma: torch.Tensor, keep: Keep, total: float | None = None) -> int:
    """Return how many singular values are kept, at least one; for a stack, as many as the most demanding matrix needs.

    Args:
        sigma: largest first, ``[…, n]``.
        keep: how much.
        total: sum of all squares; default: that of ``sigma``, matrix by matrix.
    """
    rank = sigma.shape[-1]
    if keep.energy is not None:
        squares = sigma.double() ** 2
        whole = squares.sum(-1, keepdim=True) if total is None else total
        # The slack absorbs the rounding of the sum, which would otherwise miss a share of 1.
        reached = squares.cumsum(-1) >= keep.energy * whole * (1 - 1e-12)
        wanted = (~reached).sum(-1) + 1
        rank = min(rank, int(wanted.max()))
    if keep.rank is not None:
        rank = min(rank, keep.rank)
    return max(rank, 1)

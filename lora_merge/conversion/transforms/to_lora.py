"""A change without factors → factors of a lower rank: its largest singular values, from random samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.conversion.transforms.pad_rank import PadRank
from lora_merge.conversion.transforms.pair import Pair
from lora_merge.conversion.transforms.reduce_rank import rank_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lora_merge.conversion.lora import Keep

_EXACT_SIDE = 512
"""A matrix whose smaller side is at most this is decomposed exactly."""

# Parameters of the randomised decomposition: columns beyond the wanted rank, and rounds of power iteration.
_OVERSAMPLES = 16
_ROUNDS = 4

# An energy does not tell a rank. The first guess is doubled until it holds enough of the change.
_FIRST_GUESS = 32


def factorised(change: torch.Tensor, keep: Keep) -> Pair:
    """Return factors of a matrix of a lower rank that is the nearest to a change, or very close to the nearest.

    The result is deterministic. The caller measures how far the product is from the change.

    Args:
        change: float32 ``[out, in]``.
        keep: how much of it is kept. ``rank`` or ``energy`` has to be set.

    Reference:
        Halko, Martinsson and Tropp, 2011, https://arxiv.org/abs/0909.4061, algorithm 4.4.
    """
    import torch

    side = min(change.shape)
    total = float(change.double().norm() ** 2)
    # Sampling pays only well below the full rank.
    if side <= _EXACT_SIDE or (keep.rank or 0) * 3 >= side:
        return _kept(torch.linalg.svd(change, full_matrices=False), keep, total)
    wanted = keep.rank if keep.energy is None else min(_FIRST_GUESS, keep.rank or side)
    assert wanted is not None
    while True:
        n_samples = wanted + _OVERSAMPLES
        if n_samples * 3 >= side:
            return _kept(torch.linalg.svd(change, full_matrices=False), keep, total)
        u, sigma, v = _leading(change, n_samples)
        enough = keep.energy is None or float((sigma[:wanted].double() ** 2).sum()) >= keep.energy * total
        if enough or (keep.rank is not None and wanted >= keep.rank):
            return _kept((u, sigma, v), keep, total)
        wanted = min(2 * wanted, keep.rank or side)


def stacked(pairs: Sequence[Pair]) -> Pair:
    """Return several pairs as one stack, padded to the largest rank among them."""
    import torch

    rank = max(pair.rank for pair in pairs)
    padded = [PadRank(rank)(pair) for pair in pairs]
    return Pair(torch.stack([pair.a for pair in padded]), torch.stack([pair.b for pair in padded]))


def _leading(change: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return about the n largest singular values of a matrix, with their vectors: U, σ, Vᵀ."""
    import torch

    # The same random numbers every time, so that the same inputs give the same bytes.
    generator = torch.Generator().manual_seed(0)
    sample = change @ torch.randn(change.shape[1], n, generator=generator)
    for _ in range(_ROUNDS):
        # Orthonormalised in each round: powers of the matrix would lose the small singular values to
        # rounding.
        basis, _ = torch.linalg.qr(sample)
        back, _ = torch.linalg.qr(change.T @ basis)
        sample = change @ back
    basis, _ = torch.linalg.qr(sample)
    u, sigma, v = torch.linalg.svd(basis.T @ change, full_matrices=False)
    return basis @ u, sigma, v


def _kept(found: tuple[torch.Tensor, ...], keep: Keep, total: float) -> Pair:
    u, sigma, v = found
    rank = rank_of(sigma, keep, total)
    root = sigma[:rank].sqrt()
    return Pair((v[:rank] * root[:, None]).contiguous(), (u[:, :rank] * root).contiguous())

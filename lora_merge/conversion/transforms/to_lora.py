"""A change without factors → factors: its largest singular values, found by sampling what it does."""

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
"""A matrix with a side up to this is decomposed as it is."""

_OVERSAMPLES = 16
_ROUNDS = 4
_FIRST_GUESS = 32


def factorised(change: torch.Tensor, keep: Keep) -> Pair:
    """Return the factors of a change's nearest matrix of a lower rank, or very nearly that.

    The range of a large matrix is found from what it does to random vectors, the same ones every time. How far the
    product is from the change is for the caller to measure.

    Args:
        change: float32 ``[out, in]``.
        keep: how much of it.

    Reference:
        Halko, Martinsson and Tropp, 2011, https://arxiv.org/abs/0909.4061, algorithm 4.4.
    """
    import torch

    side = min(change.shape)
    total = float(change.double().norm() ** 2)
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
    """Return the factors of several matrices as those of a stack, of the largest rank among them."""
    import torch

    rank = max(pair.rank for pair in pairs)
    padded = [PadRank(rank)(pair) for pair in pairs]
    return Pair(torch.stack([pair.a for pair in padded]), torch.stack([pair.b for pair in padded]))


def _leading(change: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the n largest singular values of a matrix and their vectors, approximately."""
    import torch

    generator = torch.Generator().manual_seed(0)
    sample = change @ torch.randn(change.shape[1], n, generator=generator)
    for _ in range(_ROUNDS):
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

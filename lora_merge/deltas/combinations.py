"""Combinations: the changes that several adapters make to one weight → one change. `COMBINATIONS` is the table.

They work on the true deltas, not on factors, so ranks, scales and kinds may differ from adapter to adapter.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lora_merge.core.plan import Combination

Combine = Callable[
    ["Sequence[torch.Tensor]", "torch.Tensor", "Combination", "torch.Generator"], "torch.Tensor"
]
"""Changes, float32 of one shape; weights, one each; how; what chance is drawn from → the combined change."""


def combine(changes: Sequence[torch.Tensor], weights: Sequence[float], how: Combination) -> torch.Tensor:
    """Return the combined change of one tensor. What is random in it depends on `Combination.seed` and ``rng_key``
    alone.

    Shapes:
        changes: float32 ``[rows, cols]``, or ``[blocks, rows, cols]`` for stacked matrices.

    Args:
        changes: what each adapter changes, before its weight is applied.
        weights: how much of each is wanted.
        how: the method and its settings.
    """
    import torch

    device = changes[0].device
    generator = torch.Generator()  # of the CPU, so that a GPU drops the same values
    generator.manual_seed(
        zlib.crc32(f"{how.seed}/{how.rng_key}".encode())
    )  # 32 bits are all that a CPU generator uses
    return COMBINATIONS[how.method](changes, torch.tensor(list(weights), device=device), how, generator)


def ties(
    changes: Sequence[torch.Tensor], weights: torch.Tensor, how: Combination, generator: torch.Generator
) -> torch.Tensor:
    """Trim each change to its largest values, elect a sign per value, and average those that agree.

    Reference:
        Yadav et al., 2023, https://arxiv.org/abs/2306.01708; ``peft.utils.merge_utils.ties`` (PEFT 0.21.2).
    """
    del generator
    # At density 1 nothing is trimmed.
    if how.density < 1:
        changes = [_trimmed(change, how.density) for change in changes]
    return _elected(changes, weights)


def dare_linear(
    changes: Sequence[torch.Tensor], weights: torch.Tensor, how: Combination, generator: torch.Generator
) -> torch.Tensor:
    """Drop values at random, scale up the rest, and add.

    Reference:
        Yu et al., 2024, https://arxiv.org/abs/2311.03099; ``peft.utils.merge_utils.dare_linear`` (PEFT 0.21.2).
    """
    return _sum([_thinned(change, how.density, generator) for change in changes], weights)


def dare_ties(
    changes: Sequence[torch.Tensor], weights: torch.Tensor, how: Combination, generator: torch.Generator
) -> torch.Tensor:
    """Drop values at random, scale up the rest, elect a sign per value, and average those that agree.

    Reference:
        As `dare_linear` and `ties`; ``peft.utils.merge_utils.dare_ties`` (PEFT 0.21.2).
    """
    return _elected([_thinned(change, how.density, generator) for change in changes], weights)


def svd(
    changes: Sequence[torch.Tensor], weights: torch.Tensor, how: Combination, generator: torch.Generator
) -> torch.Tensor:
    """Add, and keep the largest singular values of the sum; of each matrix, where they are stacked.

    Reference:
        ``peft.tuners.lora.model.LoraModel._svd_generalized_task_arithmetic_weighted_adapter`` (PEFT 0.21.2).
    """
    import torch

    del generator
    # All of this works on the last two axes, so a stack is decomposed matrix by matrix.
    u, s, v = torch.linalg.svd(_sum(changes, weights), full_matrices=False)
    kept: torch.Tensor = (u[..., : how.rank] * s[..., None, : how.rank]) @ v[..., : how.rank, :]
    return kept


COMBINATIONS: Mapping[str, Combine] = {
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "svd": svd,
}


def _thinned(change: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Return a change with a share of ``1 - density`` of its values dropped, and the rest divided by ``density``."""
    import torch

    if density == 1:
        return change
    # PEFT's function draws from the generator that all threads share; this one is the tensor's own.
    kept = torch.rand(change.shape, generator=generator) < density
    return change * kept.to(change.device) / density


def _sum(changes: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    import torch

    total = torch.zeros_like(changes[0])
    for weight, change in zip(weights, changes, strict=True):
        total += weight * change
    return total


def _elected(changes: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Return the mean of the weighted values whose sign is that of their sum, value by value; 0 where there are none.

    The signs are elected by the changes before their weights, as in ``peft.utils.merge_utils.ties`` (PEFT 0.21.2).
    """
    import torch

    total = torch.zeros_like(changes[0])
    for change in changes:
        total += change
    # Where the sum is 0, PEFT elects plus.
    elected = torch.where(total >= 0, 1.0, -1.0)
    kept, n_kept = torch.zeros_like(total), torch.zeros_like(total)
    for weight, change in zip(weights, changes, strict=True):
        agrees = change.sign() == elected
        kept += weight * change * agrees
        n_kept += agrees
    return kept / n_kept.clamp(min=1)


def _trimmed(change: torch.Tensor, density: float) -> torch.Tensor:
    """Return a change with all but a share ``density`` of its values set to 0: those with the largest magnitudes."""
    import torch

    values = change.reshape(-1)
    largest = values.abs().topk(int(density * values.numel())).indices
    trimmed = torch.zeros_like(values)
    trimmed[largest] = values[largest]
    return trimmed.reshape(change.shape)

"""Adapters that have learned something: rounding that keeps what an adapter does can only show with one that does something."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch

RANK = 8
N_STEPS = 10
"""So few that the change of a weight is about 2 % of it: less than a step of most grids."""


def task(vocabulary: int, n: int = 6, length: int = 12) -> torch.Tensor:
    """Return sequences to be learned by heart, ``[n, length]``; random tokens, always the same."""
    import torch

    generator = torch.Generator().manual_seed(21)
    return torch.randint(4, vocabulary, (n, length), generator=generator)


def trained(model: Any, adapter: Path, sequences: torch.Tensor, **config: Any) -> Any:
    """Train a LoRA by heart, write it, and return the model with it, not merged.

    Args:
        model: in float32.
        adapter: where to.
        sequences: that it learns.
        **config: fields of ``LoraConfig``.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(8)
    learning = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, **config))
    parameters = [one for one in learning.parameters() if one.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=5e-4)
    for _ in range(N_STEPS):
        optimiser.zero_grad()
        loss_of(learning, sequences).backward()
        optimiser.step()
    learning.save_pretrained(adapter)
    return learning.eval()


def loss_of(model: Any, sequences: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-probability of each token but the first."""
    return -log_probabilities(model, sequences).mean()


def log_probabilities(model: Any, sequences: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each token but the first, ``[n, length - 1]``."""
    rows = model(input_ids=sequences).logits[:, :-1].log_softmax(-1)
    return rows.gather(-1, sequences[:, 1:, None]).squeeze(-1)

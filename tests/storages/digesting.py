"""Digests of decoded weights, by which an oracle's values are compared where the oracle is not installed."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def digest(values: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, little-endian, in the order of its rows. Zeros count without their sign."""
    import torch

    whole = values.detach().contiguous() + 0.0  # -0.0 + 0.0 is 0.0
    return hashlib.sha256(whole.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()

"""Codecs: stored bytes ↔ float32. One class per storage; `CODECS` is the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from lora_merge.core.tensor import TORCH_NAMES

if TYPE_CHECKING:
    import torch


class Codec(Protocol):
    """A way to store floating-point numbers."""

    def decode(self, raw: torch.Tensor, dtype: str, out: torch.Tensor) -> None:
        """Widen stored values into float32.

        Shapes:
            raw: uint8 ``[nbytes]``; out: float32 ``[rows, cols]``.
        """

    def encode(self, values: torch.Tensor, dtype: str, out: torch.Tensor) -> None:
        """Round float32 to the nearest stored value, ties to even.

        Shapes:
            values: float32 ``[rows, cols]``; out: uint8 ``[nbytes]``.
        """


class Dense:
    """Plain BF16, F16 or F32, row by row."""

    def decode(self, raw: torch.Tensor, dtype: str, out: torch.Tensor) -> None:
        """Widen stored values into float32; exact."""
        out.copy_(_typed(raw, dtype).view(out.shape))

    def encode(self, values: torch.Tensor, dtype: str, out: torch.Tensor) -> None:
        """Round float32 to the stored dtype, ties to even; the only rounding of a merge."""
        _typed(out, dtype).view(values.shape).copy_(values)


CODECS: Mapping[str, Codec] = {"dense": Dense()}


def _typed(raw: torch.Tensor, dtype: str) -> torch.Tensor:
    import torch

    return raw.view(getattr(torch, TORCH_NAMES[dtype]))

"""Codecs: stored bytes ↔ float32. One class per storage; `CODECS` is the table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


class Codec(Protocol):
    """A way to store floating-point numbers."""

    def decode(self, stored: torch.Tensor, out: torch.Tensor) -> None:
        """Widen stored values into float32.

        Shapes:
            stored: ``[rows, cols]`` in the stored dtype; out: float32 ``[rows, cols]``.
        """

    def encode(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Round float32 to the nearest stored value, ties to even.

        Shapes:
            values: float32 ``[rows, cols]``; out: ``[rows, cols]`` in the dtype to be stored.
        """


class Dense:
    """Plain BF16, F16 or F32, row by row. Where both sides are one tensor there is nothing to do."""

    def decode(self, stored: torch.Tensor, out: torch.Tensor) -> None:
        """Widen stored values into float32; exact."""
        if stored is not out:
            out.copy_(stored)

    def encode(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Round float32 to the stored dtype, ties to even; the only rounding of a merge."""
        if out is not values:
            out.copy_(values)


CODECS: Mapping[str, Codec] = {"dense": Dense()}

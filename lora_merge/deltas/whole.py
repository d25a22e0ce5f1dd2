"""Changes without factors: a vector or matrix that is added, and rows that are put in place of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lora_merge.deltas.algebra import RowWise

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.core.adapter import DeltaSpec


class Addition(RowWise):
    """W ← W + s · D, for a D of the weight's own shape: the bias of a ``lora_B``.

    Shapes:
        addend: the weight's.

    Reference:
        ``peft.tuners.lora.layer.Linear.merge`` with ``lora_bias`` (PEFT 0.21.2).
    """

    scaled: ClassVar[bool] = True

    def __init__(self, spec: DeltaSpec, factors: Mapping[str, torch.Tensor], stored: str) -> None:
        del stored
        addend = factors["addend"].float()
        self._addend = addend.reshape(len(addend), -1) * spec.scale

    def apply(self, weight: torch.Tensor, base: torch.Tensor, start: int, end: int) -> None:
        """Add the rows."""
        del base
        weight.add_(self._addend[start:end])


class Rows(RowWise):
    """W[i] ← R[k] for the k-th of the indices i: trained tokens of an embedding.

    Shapes:
        rows: ``[n, dim]``; W: ``[vocabulary, dim]``.

    Options:
        indices: n different rows of W.

    Reference:
        ``peft.tuners.trainable_tokens.layer.TrainableTokensLayer.merge`` (PEFT 0.21.2).
    """

    scaled: ClassVar[bool] = False

    def __init__(self, spec: DeltaSpec, factors: Mapping[str, torch.Tensor], stored: str) -> None:
        del stored
        self._rows = factors["rows"].float()
        self._indices = [int(index) for index in spec.options["indices"]]

    def apply(self, weight: torch.Tensor, base: torch.Tensor, start: int, end: int) -> None:
        """Put the trained rows that lie in the tile in their places."""
        del base
        for row, index in zip(self._rows, self._indices, strict=True):
            if start <= index < end:
                weight[index - start] = row

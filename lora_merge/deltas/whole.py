"""Changes without factors: a vector or matrix that is added, and rows that replace others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from lora_merge.core.facts import Division, Facts
from lora_merge.deltas.algebra import Unsurveyed

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.tensor import TensorRef


@dataclass(frozen=True, slots=True)
class AdditionFacts(Facts):
    """Of a tensor that is added: it has the weight's shape."""

    algebra: Literal["addition"] = "addition"

    is_sum: ClassVar[bool] = True
    is_scaled: ClassVar[bool] = True
    is_row_wise: ClassVar[bool] = True
    vanishes_with: ClassVar[frozenset[str]] = frozenset({"addend"})
    serving_trait: ClassVar[tuple[str, str] | None] = ("lora-bias", "lora_bias is set")

    @property
    def division(self) -> Division:
        """``"boxes"``: a box of the sum needs the same box of the addend and no more."""
        return "boxes"

    def weight_shape(self, factors: Mapping[str, TensorRef]) -> tuple[int, ...] | None:
        """Return the shape of the addend, which is the weight's."""
        return factors["addend"].shape


@dataclass(frozen=True, slots=True)
class RowsFacts(Facts):
    """Of rows that replace those of an embedding."""

    indices: tuple[int, ...]
    """Which rows of the weight, all different, in the order of those in ``rows``."""

    algebra: Literal["rows"] = "rows"

    is_row_wise: ClassVar[bool] = True
    replaces_rows: ClassVar[bool] = True
    serving_trait: ClassVar[tuple[str, str] | None] = ("tokens", "trained tokens")


class Addition(Unsurveyed):
    """W ← W + s · D, for a D of the weight's own shape: the bias of a ``lora_B``.

    Shapes:
        addend: the weight's.

    Reference:
        ``peft.tuners.lora.layer.Linear.merge`` with ``lora_bias`` (PEFT 0.21.2).
    """

    facts: ClassVar[type[Facts]] = AdditionFacts

    def __init__(self, delta: PlacedDelta, factors: Mapping[str, torch.Tensor], stored: str) -> None:
        del stored
        addend = factors["addend"].float()
        # As the view has it: a bias is ``[n, 1]``.
        self._addend = addend.reshape(len(addend), -1) * delta.scale

    def apply(self, weight: torch.Tensor, base: torch.Tensor, start: int, end: int) -> None:
        """Add rows ``start`` to ``end`` of the scaled addend."""
        del base
        weight.add_(self._addend[start:end])


class Rows(Unsurveyed):
    """W[i] ← R[k] for the k-th of the indices i: trained tokens of an embedding.

    Shapes:
        rows: ``[n, dim]``; W: ``[vocabulary, dim]``.

    Reference:
        ``peft.tuners.trainable_tokens.layer.TrainableTokensLayer.merge`` (PEFT 0.21.2).
    """

    facts: ClassVar[type[Facts]] = RowsFacts

    def __init__(self, delta: PlacedDelta, factors: Mapping[str, torch.Tensor], stored: str) -> None:
        del stored
        self._rows = factors["rows"].float()
        self._indices = cast("RowsFacts", delta.facts).indices

    def apply(self, weight: torch.Tensor, base: torch.Tensor, start: int, end: int) -> None:
        """Put the trained rows whose indices are in the tile in their places."""
        del base
        for row, index in zip(self._rows, self._indices, strict=True):
            # A tile has few of the indices, often none.
            if start <= index < end:
                weight[index - start] = row

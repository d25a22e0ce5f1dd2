"""What every algebra is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.core.adapter import DeltaSpec
    from lora_merge.core.plan import Reach

Panels = Iterator[tuple[int, int, "torch.Tensor"]]
"""``(start, end, columns)``: the stored weight panel by panel, float32 ``[rows, end - start]``, to be changed."""


class Changer(Protocol):
    """What changes rows of a stored weight: an algebra, or one that sees only its part."""

    def survey(self, panels: Panels) -> None:
        """Look at the whole weight before the first tile; for reach ``"columns"``."""

    def apply(self, weight: torch.Tensor, base: torch.Tensor, start: int, end: int) -> None:
        """Change rows ``start`` to ``end`` of the stored weight, in place.

        Shapes:
            weight: float32 ``[end - start, cols]``, as the deltas before left it; rows run over every axis of
                the tensor but the last (but the first alone, for a convolution).
            base: the same rows before any delta; the same tensor as ``weight`` for the first.
        """


class Algebra(Changer, Protocol):
    """One delta, ready to change the tiles of one weight.

    Args:
        spec: the delta.
        factors: its tensors by role, as `Factors` gives them, on the device of the weight.
        stored: dtype code that the weight will be stored in; `DeltaSpec.rounded` asks for it.
    """

    scaled: ClassVar[bool]
    """True when `DeltaSpec.scale` says how much of the change is made; else it is all or nothing."""

    def __init__(self, spec: DeltaSpec, factors: Mapping[str, torch.Tensor], stored: str) -> None: ...

    @staticmethod
    def reach(spec: DeltaSpec) -> Reach:
        """Return how much of the weight a tile's change depends on."""


class RowWise:
    """What an algebra has in common with the others whose rows depend on themselves alone."""

    @staticmethod
    def reach(spec: DeltaSpec) -> Reach:
        """Return ``"rows"``."""
        del spec
        return "rows"

    def survey(self, panels: Panels) -> None:
        """Look at nothing."""

"""What every algebra is: a delta that surveys a weight where it has to, and changes its rows in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch  # noqa: TC004 - a field's type, never evaluated

    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.facts import Facts

Panels = Iterator[tuple[int, int, "torch.Tensor"]]
"""``(start, end, columns)``: the stored weight panel by panel, float32 ``[rows, end - start]``, to be changed."""


class Changer(Protocol):
    """What changes rows of a stored weight: an algebra, or one that sees only its part."""

    def survey(self, panels: Panels) -> None:
        """Look at the whole weight before the first tile. It is called for reach ``"columns"`` only."""

    def apply(self, weight: torch.Tensor, base: torch.Tensor, start: int, end: int) -> None:
        """Change rows ``start`` to ``end`` of the stored weight, in place.

        Shapes:
            weight: float32 ``[end - start, cols]``, as the deltas before left it; rows run over every axis of
                the tensor but the last (but the first alone, for a convolution).
            base: the same rows before any delta; the same tensor as ``weight`` for the first.
        """

    def looks(self) -> Sequence[Look]:
        """Return through what the change sees a layer's input; nothing where `Facts.sees_by_factor` is False."""

    def product(self, start: int, end: int) -> Product | None:
        """Return the change of rows ``start`` to ``end``, if all it does is to add a product; else None."""


@dataclass(frozen=True, slots=True)
class Product:
    """``scale · left @ right``: rounded to float32, scaled, rounded again, and added to float32 values.

    Shapes:
        left: float32 ``[rows, r]``; right: float32 ``[r, columns]``.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Look:
    """What some outputs of a layer see of its input: A x."""

    outputs: tuple[int, int]
    """Outputs of the layer, counted through all matrices of a stack: rows of a weight stored ``[out, in]``."""

    first_input: int
    """Of those that A is for."""

    factor: torch.Tensor
    """A, float32 ``[r, inputs]``."""

    other: torch.Tensor | None
    """B, float32 ``[outputs, r]``, where the change is ``scale · B A``; else None."""

    scale: float = 1.0


class Algebra(Changer, Protocol):
    """One delta, ready to change the tiles of one weight.

    Args:
        delta: the change.
        factors: its tensors by role, as `Factors` gives them, on the device of the weight.
        stored: dtype code that the weight will be stored in; `PlacedDelta.rounded` asks for it.
    """

    facts: ClassVar[type[Facts]]
    """What `PlacedDelta.facts` is for this algebra; it says what kind of change the algebra makes."""

    def __init__(self, delta: PlacedDelta, factors: Mapping[str, torch.Tensor], stored: str) -> None: ...


class Unsurveyed:
    """A base for algebras that need not look at the whole weight first."""

    def survey(self, panels: Panels) -> None:
        """Look at nothing."""

    def looks(self) -> Sequence[Look]:
        """Return nothing: the change does not depend on A x alone."""
        return ()

    def product(self, start: int, end: int) -> Product | None:
        """Return nothing: there is more to it than a product, or less."""
        del start, end
        return None


def keeps_effect(delta: PlacedDelta) -> bool:
    """Return True for a change whose effect rounding can keep: on what a layer sees of its input. The input of an
    embedding is a number, and picks a row.
    """
    return delta.facts.sees_by_factor and not delta.delta.transposed

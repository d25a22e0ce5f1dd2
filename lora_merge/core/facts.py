"""What an algebra has to know of a change, and what may be asked of any algebra, whichever it is."""

from __future__ import annotations

from functools import reduce
from importlib import import_module
from operator import or_
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.tensor import TensorRef

Reach = Literal["rows", "columns", "tensor"]
"""What a change of some rows depends on: those rows; the whole columns, seen before; or all of the tensor."""

Division = Literal["boxes", "rows", "none"]
"""Into which parts a change can be divided: any box of the weight; whole rows only; or none."""


class Facts:
    """The facts of one change: each algebra has a separate frozen dataclass, beside its arithmetic in `lora_merge.deltas`.

    Every room asks the class variables instead of comparing names. Defaults are safe: an algebra overrides what it can promise.
    """

    __slots__ = ()

    algebra: str
    """A key of `lora_merge.deltas.ALGEBRAS`; each dataclass has its own literal, by which JSON tells them apart."""

    is_sum: ClassVar[bool] = False
    """True when the change does not depend on the weight, so that the order of several does not matter."""

    is_scaled: ClassVar[bool] = False
    """True when the scale says how much of the change is made; else it is all or nothing."""

    is_row_wise: ClassVar[bool] = False
    """True when the change of a row depends on that row alone, however the weight is stored."""

    looks_back: ClassVar[bool] = False
    """True when the change depends on the weight as it was before any other change."""

    has_factors: ClassVar[bool] = False
    """True when it has an A and a B, and so a rank."""

    sees_by_factor: ClassVar[bool] = False
    """True when it depends on a layer's input x through A x alone (`lora_merge.deltas.algebra.Changer.looks`)."""

    is_stacked: ClassVar[bool] = False
    """True when the weight is a stack of matrices, each with separate factors: ``[experts, out, in]``."""

    replaces_rows: ClassVar[bool] = False
    """True when rows of an embedding are replaced by the adapter's: trained tokens. Its facts then have `indices`."""

    by_peft: ClassVar[bool] = False
    """True when PEFT's own layer makes the change; it is loaded for that."""

    vanishes_with: ClassVar[frozenset[str]] = frozenset()
    """Roles of tensors: if one of them is all zeros, nothing changes. Empty where that is not known."""

    method_key: ClassVar[str] = ""
    """Key of the method's name in `METHOD_NAMES`, where the adapter's ``peft_type`` does not tell it."""
    serving_trait: ClassVar[tuple[str, str] | None] = None
    """The trait (`lora_merge.serving.traits`) that an adapter with such a change has for serving engines, and its detail."""

    @property
    def is_plain(self) -> bool:
        """True when the change is one product of A and B as they are stored, and nothing else."""
        return False

    @property
    def division(self) -> Division:
        """Into which parts the change can be divided, where the base stores its weight in parts."""
        return "none"

    def reach(self, *, transposed: bool) -> Reach:
        """Return how much of the weight the change of some rows depends on.

        Args:
            transposed: whether the weight is stored ``[in, out]``.
        """
        del transposed
        # The careful answer: without a promise, a row may depend on all of the weight.
        return "rows" if self.is_row_wise else "tensor"

    def effective_scale(self, scale: float) -> float:
        """Return what the product of the factors is multiplied by in all: ``scale``, unless the algebra divides it."""
        return scale

    def rank(self, factors: Mapping[str, TensorRef]) -> int:
        """Return r; of stacked factors that of one expert's matrix; 0 for a change without factors."""
        del factors
        return 0

    def shape_of(self, role: str, factors: Mapping[str, TensorRef]) -> tuple[int, ...]:
        """Return the shape of one factor as the formula has it (A ``[r, in]``, B ``[out, r]``), however it is stored."""
        return factors[role].shape

    def weight_shape(self, factors: Mapping[str, TensorRef]) -> tuple[int, ...] | None:
        """Return the shape of the weight that the change is for, ``[out, in]``; None where the factors do not tell."""
        del factors
        return None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Let a plan in JSON have the facts of any algebra in the table; pydantic asks for this when it reads one."""
        if cls is not Facts:
            return handler(source)
        # The table is above this room. It is asked by name, when JSON is read, so that a new algebra needs no second list.
        table = import_module("lora_merge.deltas").ALGEBRAS
        return handler.generate_schema(reduce(or_, (algebra.facts for algebra in table.values())))

"""The factors of a delta as its algebra takes them: loaded, unpacked, cut to the right part."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

from lora_merge.core.adapter import Packing
from lora_merge.core.facts import Facts

if TYPE_CHECKING:
    import torch

    from lora_merge.core.adapter import Delta
    from lora_merge.core.tensor import TensorRef

Load = Callable[["TensorRef"], "torch.Tensor"]

_KEPT_STACKS = 2
"""How many unpacked stacks of experts are kept: the next tensor is often another expert of the same stack."""


@dataclass(frozen=True, slots=True)
class Stack:
    """How one A and one B hold the factors of all experts: A ``[experts · r, in]``, one expert after the other."""

    experts: int
    packing: Packing = "interleaved"
    """How B holds the experts."""


@dataclass(frozen=True, slots=True)
class FactorFacts(Facts):
    """Of a change with an A and a B: how the two are stored."""

    stored_transposed: bool = False
    """True when A is stored ``[in, r]`` and B ``[r, out]`` (mlx-lm)."""

    blocks_a: int | None = None
    """How many blocks of A are on the diagonal of a larger matrix (BD-LoRA); None where A is an ordinary factor."""

    blocks_b: int | None = None
    stack: Stack | None = None
    """Where the two hold the factors of all experts."""

    has_factors: ClassVar[bool] = True

    @property
    def has_blocks(self) -> bool:
        """True when a factor is block-diagonal (BD-LoRA)."""
        return self.blocks_a is not None or self.blocks_b is not None

    def rank(self, factors: Mapping[str, TensorRef]) -> int:
        """Return r, the number of rows of A; of stacked factors, of one expert's A."""
        return self.shape_of("A", factors)[0] // (self.stack.experts if self.stack else 1)

    def shape_of(self, role: str, factors: Mapping[str, TensorRef]) -> tuple[int, ...]:
        """Return the shape of a factor: A ``[r, in]``, B ``[out, r]``."""
        shape = factors[role].shape
        return shape[::-1] if self.stored_transposed and role in {"A", "B"} else shape

    def factor_shapes(self, factors: Mapping[str, TensorRef]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B once A's blocks are laid out on their diagonal."""
        a, b = self.shape_of("A", factors), self.shape_of("B", factors)
        # A stores its blocks one above the other: laid out, it has as many times the columns. B already has all its
        # rows.
        return (a[0], a[1] * (self.blocks_a or 1), *a[2:]), b

    def weight_shape(self, factors: Mapping[str, TensorRef]) -> tuple[int, ...] | None:
        """Return the shape of B A: ``[out, in]``, then a kernel's axes; of stacked factors, that of one expert."""
        a, b = self.factor_shapes(factors)
        return (b[0], *a[1:])


class Factors:
    """Loads factors, and keeps the last stacks of them. It may be called from several threads.

    Args:
        load: returns a whole tensor in its stored dtype.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._stacks: OrderedDict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, delta: Delta, part: tuple[tuple[int, int], ...] = ()) -> dict[str, torch.Tensor]:
        """Return the tensors of a delta by role.

        Args:
            delta: whose they are.
            part: which part of its weight, as `PlacedDelta.part` has it; empty for all of it.

        Shapes:
            A: ``[r, in]``, B: ``[out, r]``, magnitude: ``[out]``, cut to the part; of several experts
            A: ``[experts, r, in]``, B: ``[experts, out, r]``.
        """
        facts = cast("FactorFacts", delta.facts) if delta.facts.has_factors else FactorFacts()
        if facts.stack is None:
            factors = {role: self._load(ref) for role, ref in delta.factors.items()}
            if facts.stored_transposed:
                factors |= {role: factors[role].T.contiguous() for role in ("A", "B")}
            return _cut(factors, part) if part else factors
        a, b = self._unstacked(delta, facts.stack)
        if part:
            experts, outputs, inputs = (slice(*limits) for limits in part)
            a, b = a[experts, :, inputs], b[experts, outputs]
        if facts.is_stacked:
            return {"A": a, "B": b}
        return {"A": a[0], "B": b[0]}

    def _unstacked(self, delta: Delta, stack: Stack) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A ``[experts, r, in]`` and B ``[experts, out, r]`` of all experts, float32."""
        a, b = delta.factors["A"], delta.factors["B"]
        # Where the bytes are, since several deltas (one per expert) may share the two tensors.
        key = (a.file, a.start, b.start)
        with self._lock:
            # Under the lock: threads that ask for one stack wait for the first, instead of unpacking it each.
            if key not in self._stacks:
                self._stacks[key] = self._unpacked(delta, stack)
                while len(self._stacks) > _KEPT_STACKS:
                    self._stacks.popitem(last=False)
            self._stacks.move_to_end(key)
            return self._stacks[key]

    def _unpacked(self, delta: Delta, stack: Stack) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of stacked experts, split.

        PEFT packs A expert by expert, and B with the expert running fastest (`ParamWrapper.get_delta_weight`, PEFT
        0.21.2); Unsloth packs both expert by expert (unslothai/unsloth#6930). NeMo Automodel keeps B ``[experts, out, r]``.
        """
        n = stack.experts
        a, b = (self._load(delta.factors[role]).float() for role in ("A", "B"))
        a = a.view(n, -1, a.shape[1])
        if stack.packing == "by-expert":
            return a, b.view(n, len(b), -1)
        if stack.packing == "expert-major":
            return a, b.view(len(b), n, -1).permute(1, 0, 2).contiguous()
        return a, b.view(len(b), -1, n).permute(2, 0, 1).contiguous()


def _cut(factors: dict[str, torch.Tensor], part: tuple[tuple[int, int], ...]) -> dict[str, torch.Tensor]:
    """Return the factors of some outputs and inputs of the weight."""
    outputs = slice(*part[0])
    cut = dict(factors)
    for role in ("B", "addend"):
        if role in factors:
            cut[role] = factors[role][outputs]
    if "magnitude" in factors:
        # Flat, since PEFT stores that of a convolution with more axes.
        cut["magnitude"] = factors["magnitude"].flatten()[outputs]
    if "A" in factors and len(part) > 1:
        cut["A"] = factors["A"][:, slice(*part[1])]
    return cut

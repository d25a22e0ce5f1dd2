"""Sums of low-rank products: LoRA on linear layers, embeddings and convolutions; AdaLoRA; BD-LoRA; experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, cast

from lora_merge.core.tensor import TORCH_NAMES
from lora_merge.deltas.algebra import Look, Product, Unsurveyed
from lora_merge.deltas.factors import FactorFacts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.facts import Division, Facts

_FUSED_RANK = 128
"""Up to this rank a product is summed in one block, before it is added (measured: up to 192 with MKL)."""

_FUSED_SIDE = 64
"""Smaller matrices go through other kernels, which sum in another order."""


@dataclass(frozen=True, slots=True)
class LowRankFacts(FactorFacts):
    """Of a low-rank sum: LoRA, AdaLoRA, BD-LoRA."""

    divisor: float | None = None
    """What the scaled product is divided by (AdaLoRA's ``ranknum + 1e-5``)."""

    algebra: Literal["low_rank"] = "low_rank"

    is_sum: ClassVar[bool] = True
    is_scaled: ClassVar[bool] = True
    is_row_wise: ClassVar[bool] = True
    sees_by_factor: ClassVar[bool] = True
    vanishes_with: ClassVar[frozenset[str]] = frozenset({"A", "B", "E"})

    @property
    def is_plain(self) -> bool:
        """True without a divisor, blocks, a stack or factors that are stored transposed."""
        return self == LowRankFacts()

    @property
    def has_flat_kernel(self) -> bool:
        """True where the factors of a convolution have its kernel flat, as AdaLoRA's do."""
        return self.divisor is not None

    @property
    def division(self) -> Division:
        """``"boxes"``: rows of B and columns of A give any part. ``"none"`` with block-diagonal factors."""
        return "none" if self.has_blocks else "boxes"

    def effective_scale(self, scale: float) -> float:
        """Return the scale over AdaLoRA's divisor; the scale itself without one."""
        return scale / (self.divisor or 1.0)


@dataclass(frozen=True, slots=True)
class StackedFacts(FactorFacts):
    """Of a low-rank sum for each expert of a stack, factors ``[experts, …]``."""

    algebra: Literal["stacked"] = "stacked"

    is_sum: ClassVar[bool] = True
    is_scaled: ClassVar[bool] = True
    is_row_wise: ClassVar[bool] = True
    sees_by_factor: ClassVar[bool] = True
    is_stacked: ClassVar[bool] = True


class Summing(NamedTuple):
    """How a low-rank product is added to a weight."""

    is_product: bool
    """True where nothing is done to it but scaling, and it is of one block."""

    is_fused: bool
    """True where B is scaled in place of the product, and the matrix library adds the product."""


def summing(delta: PlacedDelta, rank: int, shape: tuple[int, int]) -> Summing:
    """Return how the product of a delta is added.

    Args:
        delta: the change.
        rank: rows of A.
        shape: of the product, ``[out, in]``.
    """
    # Scaling by a power of two is exact, so B can be scaled in place of the product.
    exact = math.frexp(delta.scale)[0] in {0.5, -0.5}
    # A rounding or a divisor has to come between product and sum, as in PEFT.
    divisor = delta.facts.divisor if isinstance(delta.facts, LowRankFacts) else None
    plain = not delta.rounded and divisor is None
    small = rank <= _FUSED_RANK and min(shape) >= _FUSED_SIDE
    return Summing(plain and small and not delta.region.transposed, exact and plain and small)


class LowRank(Unsurveyed):
    """W ← W + s · B A, or its transpose for a weight stored ``[in, out]``.

    The bits are PEFT's: the product is formed first, scaled after, and then added. Where scaling is exact (a
    power of two) and the product is of one block (`_FUSED_RANK`), the matrix library may add it to the
    weight itself, which has the same bits and saves two passes over the tile.

    Shapes:
        A: ``[r, in]``; B: ``[out, r]``; of a convolution ``[r, in, *kernel]`` and ``[out, r, 1…]``, whose
        weight is seen as ``[out, in · kernel]``.
        E (AdaLoRA): ``[r, 1]``, the singular values; A is multiplied by them.

    Reference:
        Hu et al., 2021, https://arxiv.org/abs/2106.09685; ``peft.tuners.lora.layer.Linear.merge`` with
        ``safe_merge=False``, ``peft.tuners.adalora.layer.SVDLinear.get_delta_weight`` and
        ``peft.tuners.lora.variants.BdLoraLinearVariant`` (PEFT 0.21.2).
    """

    facts: ClassVar[type[Facts]] = LowRankFacts

    def __init__(self, delta: PlacedDelta, factors: Mapping[str, torch.Tensor], stored: str) -> None:
        facts = cast("FactorFacts", delta.facts)  # DoRA's too, whose sum this is
        self._a, self._b = plain_pair(facts, factors)
        self._scale = delta.scale
        self._divisor = facts.divisor if isinstance(facts, LowRankFacts) else None
        self._transposed = delta.region.transposed
        self._rounded_to = stored if delta.rounded else ""
        self._round_weight = bool(self._rounded_to and delta.round_before_next)
        way = summing(delta, len(self._a), (len(self._b), self._a.shape[1]))
        self._fused, self._is_product = way.is_fused, way.is_product
        if self._fused:
            self._b = self._b * delta.scale
        self._buffer: torch.Tensor | None = None

    def apply(self, weight: torch.Tensor, base: torch.Tensor, start: int, end: int) -> None:
        """Add the part of the delta that belongs to rows ``start`` to ``end`` of the stored weight."""
        del base
        if self._transposed:
            self._add(weight, self._b, self._a[:, start:end])
        else:
            self._add(weight, self._b[start:end], self._a)

    def apply_columns(self, weight: torch.Tensor, start: int, end: int) -> None:
        """Add the part of the delta that belongs to columns ``start`` to ``end`` of the stored weight."""
        if self._transposed:
            self._add(weight, self._b[start:end], self._a)
        else:
            self._add(weight, self._b, self._a[:, start:end])

    def product(self, start: int, end: int) -> Product | None:
        """Return the rows' product, unless it is rounded or divided on the way."""
        if not self._is_product:
            return None
        return Product(self._b[start:end], self._a, 1.0 if self._fused else self._scale)

    def looks(self) -> Sequence[Look]:
        """Return A for all outputs."""
        # B may be scaled already.
        scale = 1.0 if self._fused else self._scale / (self._divisor or 1.0)
        return (Look((0, len(self._b)), 0, self._a, self._b, scale),)

    def _add(self, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add ``s · left @ right``, transposed if the weight is."""
        if self._fused:
            if self._transposed:
                weight.addmm_(right.T, left.T)
            else:
                weight.addmm_(left, right)
            return
        product = self._product(left, right)
        if self._rounded_to:
            product = rounded(product, self._rounded_to)
        weight.add_(product.T if self._transposed else product)
        if self._round_weight:
            weight.copy_(rounded(weight, self._rounded_to))

    def _product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return ``s · left @ right`` in a buffer that the next call of the same shape reuses."""
        import torch

        shape = (left.shape[0], right.shape[1])
        if self._buffer is None or self._buffer.shape != shape:
            self._buffer = torch.empty(shape, dtype=torch.float32, device=left.device)
        # Multiplied first and scaled after, as PEFT does it: the other order has other bits.
        product = torch.mm(left, right, out=self._buffer).mul_(self._scale)
        if self._divisor is not None:
            # PEFT divides by a float32 tensor (``ranknum``), not by a Python number.
            product.div_(torch.tensor(self._divisor, dtype=torch.float32, device=left.device))
        return product


class Stacked(Unsurveyed):
    """W[e] ← W[e] + s · B[e] A[e] for every expert e, or its transpose where experts are ``[in, out]``.

    Shapes:
        A: ``[experts, r, in]``; B: ``[experts, out, r]``.
        W: ``[experts, out, in]``, or ``[experts, in, out]`` when the region is transposed.

    Reference:
        ``peft.tuners.lora.layer.ParamWrapper.get_delta_weight`` (PEFT 0.21.2).
    """

    facts: ClassVar[type[Facts]] = StackedFacts

    def __init__(self, delta: PlacedDelta, factors: Mapping[str, torch.Tensor], stored: str) -> None:
        self._a, self._b = factors["A"].float(), factors["B"].float()
        self._scale, self._transposed = delta.scale, delta.region.transposed
        self._rounded_to = stored if delta.rounded else ""
        self._rows = self._a.shape[2] if self._transposed else self._b.shape[1]

    def apply(self, weight: torch.Tensor, base: torch.Tensor, start: int, end: int) -> None:
        """Add the part of the delta that belongs to some rows, which are counted through all experts."""
        del base
        if weight.is_cuda and start % self._rows == end % self._rows == 0:
            # On a GPU one batched product for the whole experts of a tile.
            experts = slice(start // self._rows, end // self._rows)
            weight.view(-1, self._rows, weight.shape[1]).add_(self._delta(self._a[experts], self._b[experts]))
            return
        at = start
        while at < end:
            # A tile may begin and end within an expert. On the CPU a product per expert has PEFT's bits.
            expert, first = divmod(at, self._rows)
            n = min(self._rows - first, end - at)
            a, b = self._a[expert], self._b[expert]
            if self._transposed:
                delta = self._delta(a[:, first : first + n], b)
            else:
                delta = self._delta(a, b[first : first + n])
            weight[at - start : at - start + n].add_(delta)
            at += n

    def looks(self) -> Sequence[Look]:
        """Return each expert's A for its own outputs."""
        n = self._b.shape[1]
        return tuple(
            Look((expert * n, (expert + 1) * n), 0, a, b, self._scale)
            for expert, (a, b) in enumerate(zip(self._a, self._b, strict=True))
        )

    def _delta(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return ``s · B A``, of one expert or of several, in the orientation of the stored weight."""
        delta = (b @ a).mul_(self._scale)
        if self._transposed:
            delta = delta.mT
        return rounded(delta, self._rounded_to) if self._rounded_to else delta


def rounded(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return float32 values rounded to a stored dtype, in float32 again.

    Args:
        values: any shape.
        dtype: a safetensors code: ``"BF16"``.
    """
    import torch

    return values.to(getattr(torch, TORCH_NAMES[dtype])).float()


def plain_pair(facts: FactorFacts, factors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 A ``[r, in]`` and B ``[out, r]``: E multiplied into A, blocks on diagonals, kernels flat."""
    a, b = factors["A"].float(), factors["B"].float()
    if "E" in factors:
        a = a * factors["E"].float()
    a, b = _on_diagonal(a, facts.blocks_a or 1), _on_diagonal(b, facts.blocks_b or 1)
    return a.flatten(1), b.flatten(1)


def _on_diagonal(factor: torch.Tensor, n_blocks: int) -> torch.Tensor:
    """Return a factor whose blocks are stored one above the other as one block-diagonal matrix."""
    import torch

    if n_blocks == 1:
        return factor
    laid_out: torch.Tensor = torch.block_diag(*torch.chunk(factor, n_blocks))  # type: ignore[no-untyped-call]
    return laid_out

"""What a projection of a merged tensor must come to: the change of every row, times weights, from the factors alone.

The factors are read by the code that recomputes values (`lora_merge.checks.formulas`), in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from lora_merge.checks.formulas import Site, sides
from lora_merge.checks.reading import Factors
from lora_merge.checks.weighing import Pattern
from lora_merge.core.plan import Block

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch  # noqa: TC004 - a field's type, never evaluated

    from lora_merge.core.adapter import DeltaSpec
    from lora_merge.core.plan import Merge
    from lora_merge.core.tensor import TensorRef

Manner = Literal["sums", "directions", "sizes", ""]
"""How the rows of a tensor are checked: against what is added to them; against the direction and the length that DoRA gives
them; against how far a combination can take them; or not at all."""

_PRODUCTS = {"low_rank", "stacked"}
_LINEAR = {*_PRODUCTS, "addition", "rows"}


def manner_of(op: Merge) -> Manner:
    """Return how the rows of a merged tensor can be checked by a projection."""
    kinds = {delta.kind for delta in op.deltas}
    if op.combination is not None:
        return "sizes" if kinds <= _PRODUCTS else ""
    if kinds <= _LINEAR and all(_is_wide(op, delta) for delta in op.deltas if delta.kind == "rows"):
        return "sums"
    return "directions" if kinds == {"dora"} and _are_apart(op) else ""


def _block(op: Merge, delta: DeltaSpec) -> Block:
    return Block.of(op.view, delta.region.at)


def _is_wide(op: Merge, delta: DeltaSpec) -> bool:
    """Return True where a delta has rows of the stored tensor in all their columns."""
    return not delta.region.transposed and _block(op, delta).columns == (0, op.view.columns)


def _are_apart(op: Merge) -> bool:
    """Return True where each delta has whole rows of its own."""
    ranges = sorted(limits for delta in op.deltas for limits in _block(op, delta).row_ranges())
    apart = all(one[1] <= other[0] for one, other in pairwise(ranges))
    return apart and all(_is_wide(op, delta) and delta.weight == 1 for delta in op.deltas)


def _stored_rows(op: Merge, delta: DeltaSpec, rows: Sequence[int]) -> list[int]:
    """Return where rows of a delta's weight are in the stored tensor."""
    ((first, last),) = _block(op, delta).row_ranges()
    return [first + int(row) for row in rows if int(row) < last - first]


@dataclass(slots=True)
class Expected:
    """What becomes of a row w: ``w - taken · w + change``, in the products; of DoRA, that direction with a length.

    Shapes:
        taken: ``[rows]``, or None for none; change: ``[rows, groups]``; spread: ``[rows]``, how far a combination may take a
        row; lengths: ``[rows]``, NaN where there are none.
    """

    taken: torch.Tensor | None
    change: torch.Tensor
    spread: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    """What the columns of a pattern are multiplied by.

    Shapes:
        x: ``[taken]``.
    """

    pattern: Pattern
    x: torch.Tensor

    def products(self, matrix: torch.Tensor, column: int) -> torch.Tensor:
        """Return the products of rows that have some columns, from one on, ``[rows, groups]``."""
        if matrix.shape[1] != self.pattern.columns:
            whole = matrix.new_zeros(len(matrix), self.pattern.columns)
            whole[:, column : column + matrix.shape[1]] = matrix
            matrix = whole
        return self.pattern.select(matrix.contiguous()) @ self.x


def expect(op: Merge, slot: TensorRef, weights: Weights) -> Expected:
    """Return what the products of a tensor must come to.

    Raises:
        CheckpointError: a factor cannot be read.
    """
    import torch

    n_rows = op.view.n_rows
    found = Expected(
        taken=torch.zeros(n_rows) if any(delta.kind == "rows" for delta in op.deltas) else None,
        change=torch.zeros(n_rows, weights.pattern.groups),
        spread=torch.zeros(n_rows),
        lengths=torch.full((n_rows,), torch.nan),
    )
    factors = Factors()
    for delta in op.deltas:
        if delta.kind == "addition":
            _add_addition(found, op, delta, factors, weights)
        elif delta.kind == "rows":
            _replace(found, op, delta, factors, weights)
        else:
            for product in _products(op, delta, slot, factors):
                _add(found, product, weights)
                if op.combination is not None:
                    _widen(found, op, product)
        if delta.kind == "dora":
            _lengthen(found, op, delta, factors)
    return found


@dataclass(frozen=True, slots=True)
class _Product:
    """A part of a delta: ``scale · left @ right`` on some rows of the stored tensor, from some column on."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    rows: tuple[int, int]
    column: int


def _products(op: Merge, delta: DeltaSpec, slot: TensorRef, factors: Factors) -> Iterator[_Product]:
    """Yield the parts of a delta: one, or one for each expert of a stack."""
    block = _block(op, delta)
    site = Site(factors, op, range(0), slot.dtype, (block.blocks, block.rows, block.columns))
    scale = delta.factor * delta.weight
    if delta.kind == "stacked":
        for expert in range(block.blocks[1] - block.blocks[0]):
            first = (block.blocks[0] + expert) * op.view.rows + block.rows[0]
            left, right = sides(site, delta, expert, range(site.rows_of_one))
            yield _Product(left, right, scale, (first, first + len(left)), block.columns[0])
        return
    left, right = sides(site, delta, 0, range(site.n_rows))
    left, right = left.flatten(1), right.flatten(1)
    done = 0
    for first, last in block.row_ranges():
        yield _Product(left[done : done + last - first], right, scale, (first, last), block.columns[0])
        done += last - first


def _add(found: Expected, product: _Product, weights: Weights) -> None:
    """Add a product to what is expected."""
    first, last = product.rows
    weighed = product.scale * weights.products(product.right, product.column)
    found.change[first:last].addmm_(product.left, weighed)


def _add_addition(found: Expected, op: Merge, delta: DeltaSpec, factors: Factors, weights: Weights) -> None:
    """Add a delta that has no factors."""
    block = _block(op, delta)
    start = delta.part[0][0] if delta.part else 0
    for first, last in block.row_ranges():
        addend = factors.tensor(delta.tensors["addend"], range(start, start + last - first)).flatten(1)
        found.change[first:last] += delta.scale * delta.weight * weights.products(addend, block.columns[0])
        start += last - first


def _replace(found: Expected, op: Merge, delta: DeltaSpec, factors: Factors, weights: Weights) -> None:
    """Put trained rows in the place of others."""
    rows = _stored_rows(op, delta, delta.options["indices"])
    trained = weights.products(factors.tensor(delta.tensors["rows"]).flatten(1)[: len(rows)], 0)
    found.change[rows] = (1 - delta.weight) * found.change[rows] + delta.weight * trained
    assert found.taken is not None
    found.taken[rows] = 1 - (1 - found.taken[rows]) * (1 - delta.weight)


def _widen(found: Expected, op: Merge, product: _Product) -> None:
    """Let rows be off by the whole change of an adapter, scaled up as the combination does it."""
    assert op.combination is not None
    share = 1.0 if op.combination.method in {"ties", "svd"} else 1 / op.combination.density
    squares = ((product.left @ (product.right @ product.right.T)) * product.left).sum(1).clamp_(min=0)
    first, last = product.rows
    found.spread[first:last] += abs(product.scale) * share * squares.sqrt()


def _lengthen(found: Expected, op: Merge, delta: DeltaSpec, factors: Factors) -> None:
    """Expect the lengths that DoRA gives to rows."""
    magnitude = factors.tensor(delta.tensors["magnitude"]).flatten()
    magnitude = magnitude[slice(*delta.part[0])] if delta.part else magnitude
    done = 0
    for first, last in _block(op, delta).row_ranges():
        found.lengths[first:last] = magnitude[done : done + last - first]
        done += last - first

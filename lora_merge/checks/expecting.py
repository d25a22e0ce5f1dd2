"""What the projection of a merged tensor must be: each row's change times random weights, from the factors alone.

The factors are read by the code that recomputes values (`lora_merge.checks.formulas`). Plain products need no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, cast

from lora_merge.checks.floats import floats_of
from lora_merge.checks.formulas import Site, sides
from lora_merge.checks.reading import Factors, Tensors
from lora_merge.checks.weighing import Pattern
from lora_merge.core.adapter import PLAIN
from lora_merge.core.plan import Merge
from lora_merge.core.tensor import TORCH_NAMES
from lora_merge.core.view import Block

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch  # noqa: TC004 - a field's type, never evaluated

    from lora_merge.checks.floats import Numbers  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.deltas import RowsFacts

Manner = Literal["sums", "directions", "sizes", ""]
"""How the rows of a tensor are checked: against what is added to them; against the direction and the length that DoRA
gives them; against how far a combination can move them; or not at all.
"""


def manner_of(op: Merge) -> Manner:
    """Return how the rows of a merged tensor are checked; empty where no projection can."""
    expected = {EXPECTED.get(delta.algebra) for delta in op.deltas}
    # Which values a combination keeps is not linear, so only the size of the change is bounded.
    if op.combination is not None:
        return "sizes" if expected <= {_add_products} else ""
    linear = {_add_products, _add_addition, _replace}
    if expected <= linear and all(_is_wide(op, delta) for delta in op.deltas if delta.facts.replaces_rows):
        return "sums"
    return "directions" if expected == {_add_and_lengthen} and _are_apart(op) else ""


def is_plain_product(delta: PlacedDelta) -> bool:
    """Return whether a delta is ``scale · B A`` of two matrices as they are stored, on a whole matrix, without a rounding on the way."""
    factors = delta.factors
    return (
        delta.facts.is_plain
        and factors.keys() == {"A", "B"}
        and delta.region == PLAIN
        and not (delta.part or delta.delta.transposed or delta.rounded)
        and all(ref.dtype in TORCH_NAMES and len(ref.shape) == 2 for ref in factors.values())
    )


def is_one_product(op: Merge) -> bool:
    """Return whether a merge adds one such product and rounds to the nearest number, or for the adapter."""
    return (
        op.combination is None
        and (op.rounding is None or op.rounding.method == "adapter")
        and len(op.deltas) == 1
        and op.deltas[0].adapter_weight == 1
        and is_plain_product(op.deltas[0])
    )


def is_plain_sum(op: Merge) -> bool:
    """Return whether `expect` needs no torch for a merge: nothing but such products is added."""
    return op.combination is None and all(map(is_plain_product, op.deltas))


def _block(op: Merge, delta: PlacedDelta) -> Block:
    return Block.of(op.view, delta.region.box)


def _is_wide(op: Merge, delta: PlacedDelta) -> bool:
    """Return True when a delta changes rows of the stored tensor in all their columns."""
    return not delta.region.transposed and _block(op, delta).columns == (0, op.view.columns)


def _are_apart(op: Merge) -> bool:
    """Return True when each delta has whole rows for itself, so that each row has one length."""
    # Sorted, so that only neighbours need to be compared.
    ranges = sorted(limits for delta in op.deltas for limits in _block(op, delta).row_ranges())
    apart = all(one[1] <= other[0] for one, other in pairwise(ranges))
    return apart and all(_is_wide(op, delta) and delta.adapter_weight == 1 for delta in op.deltas)


def _stored_rows(op: Merge, delta: PlacedDelta, rows: Sequence[int]) -> list[int]:
    """Return the numbers in the stored tensor of rows of a delta's weight; those beyond its part are left out."""
    ((first, last),) = _block(op, delta).row_ranges()
    return [first + int(row) for row in rows if int(row) < last - first]


@dataclass(frozen=True, slots=True)
class Expected:
    """What becomes of a row w, in the products: ``w - taken · w + change``. For DoRA that is the direction; the
    length is given.

    Shapes:
        taken: ``[rows]``, or None for none; change: ``[rows, groups]``; spread: ``[rows]``, how far a combination may take a
        row; lengths: ``[rows]``, NaN where there are none.
    """

    taken: Numbers | None
    change: Numbers
    spread: Numbers
    lengths: Numbers


@dataclass(frozen=True, slots=True)
class _Sums:
    """The same, while the deltas are added one by one: views of the arrays as torch's tensors."""

    taken: torch.Tensor | None
    change: torch.Tensor
    spread: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, expected: Expected) -> _Sums:
        import torch

        taken = None if expected.taken is None else torch.from_numpy(expected.taken)
        return cls(taken, *map(torch.from_numpy, (expected.change, expected.spread, expected.lengths)))


@dataclass(frozen=True, slots=True)
class Weights:
    """The random weights that the columns of a pattern are multiplied by.

    Shapes:
        x: ``[taken]``.
    """

    pattern: Pattern
    x: Numbers

    def products(self, matrix: torch.Tensor, column: int) -> torch.Tensor:
        """Return the products of rows that have only some columns, from ``column`` on: ``[rows, groups]``."""
        import torch

        # The columns that it lacks are zero, so they add nothing.
        if matrix.shape[1] != self.pattern.columns:
            whole = matrix.new_zeros(len(matrix), self.pattern.columns)
            whole[:, column : column + matrix.shape[1]] = matrix
            matrix = whole
        return self.pattern.select(matrix.contiguous()) @ torch.from_numpy(self.x)

    def plain_products(self, matrix: Numbers) -> Numbers:
        """Return the products of rows that have all columns: ``[rows, groups]``."""
        found: Numbers = matrix[:, self.pattern.numbers()] @ self.x
        return found


def expect(op: Merge, weights: Weights) -> Expected:
    """Return what the products of a tensor's rows must be.

    Raises:
        CheckpointError: a factor cannot be read.
    """
    import numpy as np

    n_rows, is_taken = op.view.n_rows, any(delta.facts.replaces_rows for delta in op.deltas)
    found = Expected(
        taken=np.zeros(n_rows, np.float32) if is_taken else None,
        change=np.zeros((n_rows, weights.pattern.groups), np.float32),
        spread=np.zeros(n_rows, np.float32),
        lengths=np.full(n_rows, np.nan, np.float32),
    )
    if is_plain_sum(op):
        for delta in op.deltas:
            _add_plain_product(found, delta, weights)
        return found
    task = _Task(_Sums.of(found), op, Factors(), weights)
    for delta in op.deltas:
        EXPECTED[delta.algebra](task, delta)
    return found


def _add_plain_product(found: Expected, delta: PlacedDelta, weights: Weights) -> None:
    """Add a product to the expected change: B(Ax), never BA."""
    import numpy as np

    right, left = floats_of(delta.factors["A"]), floats_of(delta.factors["B"])
    weighed = weights.plain_products(right) * np.float32(delta.effective_scale * delta.adapter_weight)
    found.change[:] += left @ weighed


@dataclass(frozen=True, slots=True)
class _Task:
    """The expectation of one tensor, while its deltas are added one by one."""

    found: _Sums
    op: Merge
    factors: Factors
    weights: Weights


@dataclass(frozen=True, slots=True)
class Product:
    """A part of a delta: ``scale · left @ right``, on some rows of the stored tensor, from some column on."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    rows: tuple[int, int]
    column: int


def products_of(op: Merge, delta: PlacedDelta, factors: Tensors) -> Iterator[Product]:
    """Yield the products of a delta: one for each range of rows, or one for each expert of a stack."""
    block = _block(op, delta)
    site = Site(factors, op, range(0), op.between_dtype, (block.blocks, block.rows, block.columns))
    scale = delta.effective_scale * delta.adapter_weight
    if delta.facts.is_stacked:
        for expert in range(block.blocks[1] - block.blocks[0]):
            first = (block.blocks[0] + expert) * op.view.rows + block.rows[0]
            left, right = sides(site, delta, expert, range(site.rows_of_one))
            yield Product(left, right, scale, (first, first + len(left)), block.columns[0])
        return
    left, right = sides(site, delta, 0, range(site.n_rows))
    left, right = left.flatten(1), right.flatten(1)
    done = 0
    for first, last in block.row_ranges():
        yield Product(left[done : done + last - first], right, scale, (first, last), block.columns[0])
        done += last - first


def _add_products(task: _Task, delta: PlacedDelta) -> None:
    """Expect the product of two factors; with a combination, also how far it may move a row."""
    for product in products_of(task.op, delta, task.factors):
        _add(task.found, product, task.weights)
        if task.op.combination is not None:
            _widen(task.found, task.op, product)


def _add(found: _Sums, product: Product, weights: Weights) -> None:
    """Add a product to the expected change: B(Ax), never BA."""
    first, last = product.rows
    weighed = product.scale * weights.products(product.right, product.column)
    found.change[first:last].addmm_(product.left, weighed)


def _add_addition(task: _Task, delta: PlacedDelta) -> None:
    """Expect a delta without factors: a vector or a matrix that is added."""
    found, factors, weights = task.found, task.factors, task.weights
    block = _block(task.op, delta)
    start = delta.part[0][0] if delta.part else 0
    for first, last in block.row_ranges():
        addend = factors.tensor(delta.factors["addend"], range(start, start + last - first)).flatten(1)
        found.change[first:last] += (
            delta.scale * delta.adapter_weight * weights.products(addend, block.columns[0])
        )
        start += last - first


def _replace(task: _Task, delta: PlacedDelta) -> None:
    """Expect trained rows in the place of others, by the adapter's weight."""
    found, share = task.found, delta.adapter_weight
    rows = _stored_rows(task.op, delta, cast("RowsFacts", delta.facts).indices)
    own = task.factors.tensor(delta.factors["rows"]).flatten(1)[: len(rows)]
    trained = task.weights.products(own, 0)
    found.change[rows] = (1 - share) * found.change[rows] + share * trained
    assert found.taken is not None
    # Of the base's row each replacement leaves 1 - share.
    found.taken[rows] = 1 - (1 - found.taken[rows]) * (1 - share)


def _widen(found: _Sums, op: Merge, product: Product) -> None:
    """Let rows be off by an adapter's whole change, scaled up as the combination scales it."""
    assert op.combination is not None
    share = 1.0 if op.combination.method in {"ties", "svd"} else 1 / op.combination.density
    # ‖BA‖² of each row is b (AAᵀ) bᵀ, which takes r² instead of the width of the row.
    squares = ((product.left @ (product.right @ product.right.T)) * product.left).sum(1).clamp_(min=0)
    first, last = product.rows
    found.spread[first:last] += abs(product.scale) * share * squares.sqrt()


def _add_and_lengthen(task: _Task, delta: PlacedDelta) -> None:
    """Expect the product of two factors, and DoRA's magnitude as each row's length."""
    _add_products(task, delta)
    magnitude = task.factors.tensor(delta.factors["magnitude"]).flatten()
    magnitude = magnitude[slice(*delta.part[0])] if delta.part else magnitude
    done = 0
    for first, last in _block(task.op, delta).row_ranges():
        task.found.lengths[first:last] = magnitude[done : done + last - first]
        done += last - first


EXPECTED: Mapping[str, Callable[[_Task, PlacedDelta], None]] = {
    "low_rank": _add_products,
    "stacked": _add_products,
    "dora": _add_and_lengthen,
    "addition": _add_addition,
    "rows": _replace,
}
"""By algebra. The table is separate from `lora_merge.deltas.ALGEBRAS` on purpose, as
`lora_merge.checks.formulas.FORMULAS` is. Rows that an algebra without an entry changes are not projected.
"""

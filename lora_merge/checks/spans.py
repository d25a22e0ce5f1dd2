"""Outputs of a weight whose deltas see their input alike, with a basis of what they see: by code that the merge does not use."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from lora_merge.checks.expecting import products_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch  # noqa: TC004 - a field's type, never evaluated

    from lora_merge.checks.expecting import Product  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.checks.reading import Tensors
    from lora_merge.core.plan import Merge

_KEPT = 1e-6
"""Directions of A below this share of its largest are rounding errors of the factors."""

_FLOAT32 = 2.0**-24
_BASES = 64


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """What some deltas see of their inputs.

    Shapes:
        rows: float64 ``[r, in]``, orthonormal; sizes: float64 ``[n]``, the lengths of the rows of A; left: float64 ``[outputs, n]``,
            B times its scale.
    """

    rows: torch.Tensor
    off: float
    """By how much of its length the merge's basis may be turned: float32 rounds its rows and those of A, and the inverse of the
    smallest singular value that is kept multiplies that."""

    sizes: torch.Tensor
    left: torch.Tensor


@dataclass(frozen=True, slots=True)
class Look:
    """A product of factors: the outputs that it is for, counted through all matrices, and the first of its inputs."""

    outputs: tuple[int, int]
    first_input: int
    product: Product


class Spans:
    """The outputs of one weight, in ranges that the same products are for; none of them is across two matrices.

    Args:
        reader: reads factors.
        op: what is done to the weight.

    Raises:
        CheckpointError: a factor cannot be read.
    """

    def __init__(self, reader: Tensors, op: Merge) -> None:
        self._op = op
        seeing = [delta for delta in op.deltas if delta.facts.sees_by_factor and not delta.delta.transposed]
        self.along = any(delta.region.transposed for delta in seeing)
        """True where the weight is stored ``[in, out]``, so that outputs are columns."""

        self._looks = [self._look(product) for delta in seeing for product in products_of(op, delta, reader)]
        self.ranges = list(self._cut())
        """First output, the one after the last, and which products are for them."""

        self._kept: OrderedDict[tuple[int, int], Basis | None] = OrderedDict()

    @property
    def n_inputs(self) -> int:
        """The number of inputs of a matrix."""
        return self._op.view.rows if self.along else self._op.view.columns

    @property
    def n_outputs(self) -> int:
        """The number of outputs of a matrix."""
        return self._op.view.columns if self.along else self._op.view.rows

    def _look(self, product: Product) -> Look:
        if not self.along:
            return Look(product.rows, product.column, product)
        matrix, first_input = divmod(product.rows[0], self._op.view.rows)
        first = matrix * self._op.view.columns + product.column
        return Look((first, first + product.right.shape[1]), first_input, product)

    def _cut(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        borders = {edge for look in self._looks for edge in look.outputs}
        if borders:
            height = self.n_outputs
            borders.update(range(-(-min(borders) // height) * height, max(borders), height))
        for first, last in pairwise(sorted(borders)):
            own = tuple(
                n
                for n, look in enumerate(self._looks)
                if look.outputs[0] <= first and look.outputs[1] >= last
            )
            if own and not self._is_left_out(first, last):
                yield first, last, own

    def _is_left_out(self, first: int, last: int) -> bool:
        """Return True for some outputs of a quantised weight stored ``[in, out]``: rounding for the adapter needs all of them."""
        op = self._op
        is_adapter = op.rounding is not None and op.rounding.method == "adapter"
        return is_adapter and self.along and not op.target.is_dense and last - first != self.n_outputs

    def mask(self, rows: Sequence[int]) -> torch.Tensor:
        """Return which values of some rows are in a span: bool, broadcast to ``[rows, columns]``."""
        import torch

        view = self._op.view
        found = torch.zeros(len(rows), view.columns if self.along else 1, dtype=torch.bool)
        for first, last, _, own in self.pieces(rows):
            if self.along:
                left = first % view.columns
                found[own, left : left + last - first] = True
            else:
                found[own] = True
        return found

    def pieces(self, rows: Sequence[int]) -> Iterator[tuple[int, int, tuple[int, ...], torch.Tensor]]:
        """Yield each range that has some of the rows, with which of them it has."""
        import torch

        view, numbers = self._op.view, torch.tensor(rows)
        low, high = min(rows), max(rows)
        for first, last, looks in self.ranges:
            if self.along:
                matrix = first // view.columns
                top, bottom = matrix * view.rows, (matrix + 1) * view.rows
            else:
                top, bottom = first, last
            # Of hundreds of experts most have none of the rows.
            if top <= high and low < bottom:
                own = ((numbers >= top) & (numbers < bottom)).nonzero().flatten()
                if len(own):
                    yield first, last, looks, own

    def basis(self, first: int, last: int, own: tuple[int, ...]) -> Basis | None:
        """Return the basis of a range; None where all of its factors are zero."""
        if (first, last) not in self._kept:
            self._kept[first, last] = self._basis(first, last, own)
            while len(self._kept) > _BASES:
                self._kept.popitem(last=False)
        return self._kept[first, last]

    def _basis(self, first: int, last: int, own: tuple[int, ...]) -> Basis | None:
        import torch

        rows, left = [], []
        for look in (self._looks[n] for n in own):
            product = look.product
            inner, outer = (product.left.T, product.right.T) if self.along else (product.right, product.left)
            whole = inner.new_zeros(len(inner), self.n_inputs)
            whole[:, look.first_input : look.first_input + inner.shape[1]] = inner
            rows.append(whole)
            left.append(product.scale * outer[first - look.outputs[0] : last - look.outputs[0]])
        a = torch.cat(rows)
        sizes = a.norm(dim=1)
        # Each row at its own length, so that a small adapter beside a large one keeps its directions.
        directions = (a / sizes.view(-1, 1))[sizes > 0]
        if not len(directions):
            return None
        columns, smallest = _orthonormal(directions)
        off = 2 * _FLOAT32 * len(directions) ** 0.5 * (1 + 1 / smallest)
        # Column by column, as products with its transpose read it: that is twice as quick.
        return Basis(columns.contiguous().T, off, sizes, torch.cat(left, 1))


def _orthonormal(directions: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return a basis of some directions as columns, and the smallest singular value that is kept.

    Shapes:
        directions: float64 ``[n, in]``; the basis: float64 ``[in, r]``.
    """
    import torch

    if len(directions) <= directions.shape[1]:
        columns, triangle = torch.linalg.qr(directions.T)
        values = torch.linalg.svdvals(triangle)
        # Where no direction is dropped, every basis does, and this one takes a fourth of the time.
        if values[-1] > _KEPT * values[0]:
            return columns, float(values[-1])
    _, values, basis = torch.linalg.svd(directions, full_matrices=False)
    kept = values > _KEPT * values[0]
    return basis[kept].T, float(values[kept][-1])

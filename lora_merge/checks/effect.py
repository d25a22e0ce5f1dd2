"""Does a rounding that should keep the adapter's effect keep it? What rounding did to it is computed again, and compared with
what the merge recorded.

A LoRA acts on an input x through A x alone. With Q an orthonormal basis of A's rows, e the rounding errors and Δ the change of a
weight, ``‖e Qᵀ‖`` is what rounding did to the effect, and ``‖Δ Qᵀ‖`` is the effect. Both are sums over outputs, so some outputs
have no more of it than all.

How far two computations may differ: float32 misses each value by what the formulas say, d, and ``‖d Qᵀ‖ ≤ ‖d‖``; its sums of n products
are off by about √n · 2⁻²⁴ ‖e‖ for each row of Q; and Q itself is rounded (`lora_merge.checks.spans.Basis.off`). The effect of a sum of
products s·BA is recorded as √(b (AAᵀ) bᵀ), whose square is off by about r · 2⁻²⁴ (Σ|bᵢ| ‖aᵢ‖)².
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.checks.effect_norms import Norms, Sums, share_of
from lora_merge.checks.spans import Basis, Spans
from lora_merge.core.report import error, note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence  # noqa: TC004 - a field's type, never evaluated

    import torch  # noqa: TC004 - a field's type, never evaluated

    from lora_merge.checks.bounds import Wanted
    from lora_merge.checks.reading import Tensors
    from lora_merge.core.plan import Merge
    from lora_merge.core.report import Issue
    from lora_merge.core.tensor import Survival

_FLOAT32 = 2.0**-24

_NUMBERS = 4
"""Roundings of a value that is divided by its scale, and multiplied again."""

_MOST_RANKS = 1 / 16
"""Directions that an adapter sees, by inputs: with more of them a coarse grid may lose as much as the nearest numbers."""

_FEW_VALUES = 1024


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Some rows of a merged weight, all float64 ``[rows, columns]``."""

    numbers: Sequence[int]
    stored: torch.Tensor
    before: torch.Tensor
    """The base's."""

    wanted: torch.Tensor
    off: torch.Tensor
    around: _Around | None
    """None where no more is asked than what was recorded."""


@dataclass(frozen=True, slots=True, eq=False)
class _Around:
    """The numbers around wanted values, all float64 ``[rows, columns]``."""

    nearest: torch.Tensor
    """What would be stored if each value became the nearest number."""

    gaps: torch.Tensor
    """Between the two numbers beside each wanted value."""

    inside: torch.Tensor | None
    """1.0 for values that have numbers on both sides, and 0.0 for others; None where all have."""


@dataclass(slots=True, eq=False)
class _Seen:
    """What the outputs of a span see: each float64 ``[outputs, r]``, and squares ``[outputs]`` of what may be off."""

    error: torch.Tensor
    nearest: torch.Tensor
    within: torch.Tensor
    gaps: torch.Tensor
    effect: torch.Tensor
    off: torch.Tensor
    size: torch.Tensor
    change: torch.Tensor

    def add(self, other: _Seen) -> None:
        self.error += other.error
        self.nearest += other.nearest
        self.within += other.within
        self.gaps += other.gaps
        self.effect += other.effect
        self.off += other.off
        self.size += other.size
        self.change += other.change


def _squares(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of the squares of each row."""
    import torch

    found: torch.Tensor = torch.linalg.vecdot(values, values)
    return found


class Effect:
    """What rounding did to the adapters' effect on one weight.

    Args:
        reader: reads factors.
        op: what was done to it.
        is_whole: whether all rows will be seen.

    Raises:
        CheckpointError: a factor cannot be read.
    """

    def __init__(self, reader: Tensors, op: Merge, *, is_whole: bool) -> None:
        self._op, self._is_whole = op, is_whole
        self._is_adapter = op.rounding is not None and op.rounding.method == "adapter"
        self._spans = Spans(reader, op) if self._is_adapter or not op.target.is_dense else None
        self._sums = Sums()
        self._turned: dict[tuple[int, int], tuple[Basis, slice, _Seen]] = {}

    @property
    def is_asked(self) -> bool:
        """True where there is an effect to look at. Of a weight stored ``[in, out]`` a few rows are a few inputs, which do not
        tell.
        """
        return (
            self._spans is not None and bool(self._spans.ranges) and (self._is_whole or not self._spans.along)
        )

    def moved(self, rows: Sequence[int]) -> torch.Tensor:
        """Return which values of some rows rounding for the adapter may have moved: bool, broadcast to the rows."""
        import torch

        if not self._is_adapter or self._spans is None:
            return torch.zeros(1, 1, dtype=torch.bool)
        return self._spans.mask(rows)

    def add(self, numbers: Sequence[int], before: torch.Tensor, wanted: Wanted) -> None:
        """Look at some rows.

        Args:
            numbers: of the rows.
            before: the base's, float64 ``[rows, columns]``.
            wanted: what they should be, and what is stored.
        """
        assert self._spans is not None
        # Whether the nearest numbers would do as well is a question to a rounding that should do better.
        around = _Around(wanted.nearest(), *wanted.steps()) if self._is_adapter else None
        rows = _Rows(numbers, wanted.stored.values, before, wanted.exact, wanted.off, around)
        self._sums.n_rows += len(numbers)
        for own, columns, basis, outputs, inputs in self._pieces(numbers):
            seen = self._seen(rows, own, columns, basis.rows[:, inputs])
            self._sums.n_values += len(own) * (columns.stop - columns.start)
            if not self._spans.along:
                self._count(seen, basis, outputs)
                continue
            # Its sums over inputs are whole after the last row.
            key = int(outputs[0]), int(outputs[-1])
            if key in self._turned:
                self._turned[key][2].add(seen)
            else:
                self._turned[key] = basis, slice(0, len(outputs)), seen

    def _pieces(
        self, rows: Sequence[int]
    ) -> Iterator[tuple[torch.Tensor, slice, Basis, torch.Tensor, slice | torch.Tensor]]:
        """Yield, for each span that has some of the rows: which of them; their columns; the basis; the outputs, as the span counts
        them from its first (of the basis' ``left``); and the inputs.
        """
        import torch

        assert self._spans is not None
        view, numbers = self._op.view, torch.tensor(rows)
        for first, last, looks, own in self._spans.pieces(rows):
            basis = self._spans.basis(first, last, looks)
            if basis is None:
                continue
            if self._spans.along:
                left = first % view.columns
                columns, outputs = slice(left, left + last - first), torch.arange(first, last)
                yield own, columns, basis, outputs, numbers[own] % view.rows
            else:
                yield own, slice(0, view.columns), basis, numbers[own] - first, slice(None)

    def _seen(self, rows: _Rows, own: torch.Tensor, columns: slice, basis: torch.Tensor) -> _Seen:
        def cut(values: torch.Tensor) -> torch.Tensor:
            found = (values if len(own) == len(values) else values[own])[:, columns]
            return found.T if self._spans is not None and self._spans.along else found

        wanted, off, stored, before = map(cut, (rows.wanted, rows.off, rows.stored, rows.before))
        error, change = stored - wanted, wanted - before
        length = wanted.abs()
        # What float32 may make wrong of the error and of the effect. A plain number is a float32 already, and its error is exact.
        error_off = off
        if not self._op.target.is_dense:
            error_off = off.add(stored.abs().add_(length), alpha=_NUMBERS * _FLOAT32)
        effect_off = off.add(before.abs().add_(length), alpha=_FLOAT32)
        nearest, within, gaps = self._around(rows.around, cut, wanted, basis)
        return _Seen(
            error @ basis.T,
            nearest,
            within,
            gaps,
            change @ basis.T,
            _squares(error_off),
            _squares(error),
            _squares(change).add_(_squares(effect_off)),
        )

    def _around(
        self,
        around: _Around | None,
        cut: Callable[[torch.Tensor], torch.Tensor],
        wanted: torch.Tensor,
        basis: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the three of `_Seen` that are about the numbers around."""
        if around is None:
            return (wanted.new_zeros(len(wanted), 0),) * 2 + (wanted.new_zeros(len(wanted)),)
        nearest, gaps = cut(around.nearest) - wanted, cut(around.gaps)
        if around.inside is None:
            seen = nearest @ basis.T
            return seen, seen.clone(), _squares(gaps)
        inside = cut(around.inside)
        return nearest @ basis.T, (nearest * inside) @ basis.T, _squares(gaps * inside)

    def _count(self, seen: _Seen, basis: Basis, outputs: torch.Tensor) -> None:
        """Add what some outputs see to the sums."""
        assert self._spans is not None
        sums, rank, n = self._sums, len(basis.rows), self._spans.n_inputs
        sums.is_narrow |= rank > _MOST_RANKS * n
        share = share_of(n, rank) + basis.off
        sums.error += float(seen.error.square().sum())
        sums.nearest += float(seen.nearest.square().sum())
        sums.within += float(seen.within.square().sum())
        # A step of the usual gap, seen by rank of n directions, against the usual effect on one input.
        sums.steps += float(seen.gaps.sum()) * (rank / (2 * n)) ** 2
        sums.effect += float(seen.effect.square().sum())
        sums.error_off += float((seen.off.sqrt() + share * seen.size.sqrt()).square().sum())
        sums.effect_off += float((seen.off.sqrt() + share * seen.change.sqrt()).square().sum())
        reach = basis.left[outputs].abs() @ basis.sizes
        sums.square_off += float((2 * len(basis.sizes) + 8) * _FLOAT32 * reach.square().sum())

    def _finish(self) -> None:
        for basis, outputs, seen in self._turned.values():
            import torch

            self._count(seen, basis, torch.arange(outputs.start, outputs.stop))
        self._turned.clear()

    def problem(self, name: str, record: Survival | None) -> Issue | None:
        """Return what is wrong with what was seen, after the last row; None where nothing is.

        Args:
            name: of the tensor.
            record: what the merge recorded of it, if that is known.
        """
        self._finish()
        found = Norms.of(self._sums)
        # Where the adapter sees a good part of all directions, rounding cannot keep its effect.
        is_told = self._sums.n_values >= _FEW_VALUES and not self._sums.is_narrow
        if self._is_adapter and is_told and found.is_lost():
            sentence = (
                f"the rounding lost {found.lost} of the adapter's effect, as much as rounding to the nearest number "
                "would; --rounding adapter must keep it"
            )
            return error(
                "effect-lost", name, sentence, "merge again; if it fails again, report it with the adapter"
            )
        if record is None or record.effect_norm < 0:
            if not self._is_adapter:
                return None
            sentence = (
                "was rounded to keep the adapter's effect, but what it kept is not recorded: each value was compared, with room for "
                "this rounding, but not their sum"
            )
            return note("effect-unknown", name, sentence)
        wrong = found.against(record, self._sums, self._op.view.n_rows, is_whole=self._is_whole)
        if not wrong:
            return None
        hint = "merge again: the tensor and its record in the manifest are not from the same merge"
        return error("wrong-effect", name, wrong, hint)

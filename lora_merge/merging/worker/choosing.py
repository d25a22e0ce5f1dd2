"""Which number of its storage each value of one weight becomes, tile by tile; and what that does to the adapters' effect."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.codecs.grid import Packed
from lora_merge.deltas import keeps_effect
from lora_merge.merging.worker.spans import Spans
from lora_merge.rounding.adapter import round_adapter
from lora_merge.rounding.compiled import merge_codes, round_to_codes
from lora_merge.rounding.stochastic import round_stochastic

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import torch

    from lora_merge.codecs.grid import Grid
    from lora_merge.core.plan import Merge
    from lora_merge.deltas.algebra import Changer, Product
    from lora_merge.merging.worker.spans import Span
    from lora_merge.rounding.bands import Memory


class Choosing:
    """Chooses the levels of one weight's tiles, in order.

    Args:
        op: what is done to the weight.
        memory: of the worker, for what one tile needs.
        is_accounted: keep account of the effect of a plain dtype's nearest numbers, too.
    """

    def __init__(self, op: Merge, memory: Memory, *, is_accounted: bool = False) -> None:
        self._op, self._rounding, self._memory = op, op.rounding, memory
        seeing = list(filter(keeps_effect, op.deltas))
        self._along = any(delta.region.transposed for delta in seeing)
        is_adapter = self._rounding is not None and self._rounding.method == "adapter"
        self._spans = Spans(op.view, transposed=self._along, fed_back=is_adapter) if seeing else None
        self._is_accounted = bool(seeing) and (is_accounted or is_adapter or not op.target.is_dense)
        self._is_sum = op.combination is None and all(
            delta.facts.is_sum and delta.facts.sees_by_factor for delta in op.deltas
        )
        is_known = self._rounding is None or is_adapter
        self.can_merge = op.on_stored_grid and self._is_accounted and self._is_sum and is_known
        """True where compiled code may choose codes and add the change at once, as far as is known."""
        self._before: torch.Tensor | None = None
        # On the device: a number would wait for a GPU in the middle of the loop.
        self._effects: list[torch.Tensor | float] = []
        self._errors: list[torch.Tensor | float] = []
        self._products: list[Span] = []
        """Whose change is of the form B A: all of it is in the row space of A."""
        # First output of a span whose inputs come in several tiles → what is seen of the error and of the change so far.
        self._sums: dict[int, tuple[torch.Tensor | None, torch.Tensor | None]] = {}

    @property
    def is_plain(self) -> bool:
        """True where each value becomes the nearest number of a plain dtype, and nothing has to be known of it."""
        return self._op.target.is_dense and self._rounding is None and not self._is_accounted

    def before(self, values: torch.Tensor) -> None:
        """Keep what a tile's change is to be told from, if only its values tell it."""
        if self._is_accounted and not self._is_sum:
            self._before = values.clone()

    def levels(
        self, values: torch.Tensor, grid: Grid, start: int, end: int, changers: Sequence[Changer]
    ) -> torch.Tensor | Packed:
        """Return the levels of a tile, if their codes are not stored yet.

        Args:
            values: float32 ``[lines, in]``, after the change.
            grid: of the tile.
            start: its first row; end: the one after its last.
            changers: of its deltas.
        """
        method = None if self._rounding is None else self._rounding.method
        spans = self._spans_of(start, end, changers) if self._is_accounted or method == "adapter" else []
        if method in {None, "adapter"}:
            packed = self._packed(values, grid, spans, start, is_fed_back=method == "adapter")
            if packed is not None:
                return packed
        if method == "adapter":
            return self._by_adapter(values, grid, spans, start)
        if self._rounding is not None and method == "stochastic":
            first = start * self._op.view.columns
            levels = round_stochastic(values, grid, self._rounding.seed, self._rounding.rng_key, first)
        else:
            levels = grid.nearest(values)
        if self._is_accounted:
            self._account(values, grid, levels, spans, start)
        return levels

    def _by_adapter(
        self, values: torch.Tensor, grid: Grid, spans: Sequence[Span], start: int
    ) -> torch.Tensor:
        levels = None
        for span in spans:
            rows, columns = self._place(span, start)
            own = values[rows, columns]
            found_grid = grid.of_lines(rows.start, rows.stop)
            if own.shape == values.shape:
                found_grid = grid
            # A grid with scales can only be cut by lines, so some of their columns are left to the nearest.
            elif columns != slice(0, values.shape[1]) and grid.scale is not None:
                continue
            chosen, error = round_adapter(
                own,
                found_grid,
                span.schedule,
                along=self._along,
                out=self._memory.of("levels", tuple(own.shape), own)
                if grid.place is None
                else grid.place[rows, columns],
                memory=self._memory,
            )
            self._add(span, own, rows, columns, error)
            if own.shape == values.shape:
                levels = chosen if grid.place is None else grid.place
            else:
                levels = grid.nearest(values) if levels is None else levels
                levels[rows, columns] = chosen
        self._before = None
        return grid.nearest(values) if levels is None else levels

    def _packed(
        self, values: torch.Tensor, grid: Grid, spans: Sequence[Span], start: int, *, is_fed_back: bool
    ) -> Packed | None:
        """Store the codes of a tile at once, if there is compiled code for it."""
        if len(spans) != 1 or self._along or spans[0].last - spans[0].first != len(values):
            return None
        error = round_to_codes(values, grid, spans[0].schedule, is_fed_back=is_fed_back)
        if error is None:
            return None
        packed = self._add(spans[0], values, *self._place(spans[0], start), error)
        self._before = None
        return packed

    def merged(
        self, grid: Grid, product: Product, start: int, end: int, changers: Sequence[Changer]
    ) -> Packed | None:
        """Store the codes of a tile, computed from what it is stored as and what is added to it, if there is compiled code for that.

        Args:
            grid: of the tile, with the stored scales.
            product: that is added.
            start: its first row; end: the one after its last.
            changers: of its deltas.
        """
        spans = self._spans_of(start, end, changers)
        if len(spans) != 1 or self._along or spans[0].last - spans[0].first != end - start:
            return None
        is_fed_back = self._rounding is not None
        error = merge_codes(
            grid, spans[0].schedule, product.left, product.right, product.scale, is_fed_back=is_fed_back
        )
        if error is None:
            # Of other tiles of the weight it would not know the grid either.
            self.can_merge = False
            return None
        self._products.append(spans[0])
        return self._add_error(error)

    def _account(
        self, values: torch.Tensor, grid: Grid, levels: torch.Tensor, spans: Sequence[Span], start: int
    ) -> None:
        """Add what the rounding of a tile does to the adapters' effect."""
        error = grid.values(levels).sub_(values)
        for span in spans:
            rows, columns = self._place(span, start)
            if self._along:
                self._add_some(span, values, error, rows, columns)
            else:
                seen = error[rows, columns] @ span.basis.t()
                self._add(span, values[rows, columns], rows, columns, seen)
        self._before = None

    def _add_some(
        self, span: Span, values: torch.Tensor, error: torch.Tensor, rows: slice, columns: slice
    ) -> None:
        """Add some inputs of a span to its sums, which are complete with the last one.

        Args:
            span: which outputs.
            values: of the tile, after the change; error: of the same.
            rows: all inputs of the span, counted from the first row of the tile; columns: its outputs.
        """
        own = slice(max(rows.start, 0), min(rows.stop, len(values)))
        basis = span.basis[:, own.start - rows.start : own.stop - rows.start].t()
        error_seen, change_seen = self._sums.pop(span.first, (None, None))
        seen = error[own, columns].t() @ basis
        error_seen = seen if error_seen is None else error_seen.add_(seen)
        if self._before is not None:
            seen = (values[own, columns] - self._before[own, columns]).t() @ basis
            change_seen = seen if change_seen is None else change_seen.add_(seen)
        if own.stop < rows.stop:
            self._sums[span.first] = error_seen, change_seen
            return
        self._errors.append(_squares(error_seen))
        self._effects.append(_squared_length(span) if change_seen is None else _squares(change_seen))

    def _spans_of(self, start: int, end: int, changers: Sequence[Changer]) -> list[Span]:
        if self._spans is None:
            return []
        if self._along:
            rows, columns = self._op.view.rows, self._op.view.columns
            # Outputs are columns here: all of those of the matrices that the tile has rows of.
            start, end = start // rows * columns, -(-end // rows) * columns
        return self._spans.of(start, end, changers)

    def _place(self, span: Span, start: int) -> tuple[slice, slice]:
        """Return the rows and columns of a tile that a span has."""
        view = self._op.view
        if not self._along:
            return slice(span.first - start, span.last - start), slice(0, view.columns)
        matrix, first = divmod(span.first, view.columns)
        row = matrix * view.rows - start
        return slice(row, row + view.rows), slice(first, first + span.last - span.first)

    def _add_error(self, error: torch.Tensor) -> Packed:
        """Add the error of a span to the account, ``(stored - values) Qᵀ``; return what tells whether it is finite."""
        import torch

        # Not finite where one of the errors is not: squares of float32 numbers are far from the ends of float64.
        norm = torch.linalg.vector_norm(error, dtype=torch.float64)
        self._errors.append(norm.square())
        return Packed(norm)

    def _add(
        self, span: Span, values: torch.Tensor, rows: slice, columns: slice, error: torch.Tensor
    ) -> Packed:
        """Add a span to the account.

        Args:
            span: which outputs.
            values: of it, after the change.
            rows: of the tile; columns: of it.
            error: ``(stored - values) Qᵀ``, float32 ``[outputs, r]``.
        """
        packed = self._add_error(error)
        if self._before is None:
            self._products.append(span)
            return packed
        change = values - self._before[rows, columns]
        seen = (change.t() if self._along else change) @ span.basis.t()
        self._effects.append(_squares(seen))
        return packed

    def know(self, effect: float, error: float) -> None:
        """Take what was found without torch: ‖ΔQᵀ‖² and ‖(Δ′ - Δ)Qᵀ‖² over all tiles."""
        self._effects.append(effect)
        self._errors.append(error)

    def effect(self) -> tuple[float, float]:
        """Return ‖ΔQᵀ‖ and ‖(Δ′ - Δ)Qᵀ‖ over all tiles; -1 for both where nothing was kept account of."""
        if not self._is_accounted:
            return -1.0, -1.0
        # Squares from factors may be rounded to below zero.
        effects = [*self._effects, *map(_squared_length, _joined(self._products))]
        effect, error = (math.sqrt(max(sum(map(float, one)), 0.0)) for one in (effects, self._errors))
        return effect, error


def _squares(seen: torch.Tensor) -> torch.Tensor:
    # Squares of large numbers are beyond float32.
    return seen.double().square_().sum()


def _joined(spans: Iterable[Span]) -> Iterator[Span]:
    """Yield spans, adjacent ones with the same changes as one: what is asked of each is asked once for several tiles."""
    before: Span | None = None
    for span in spans:
        if before is not None and (before.seen, before.last) == (span.seen, span.first):
            before = replace(before, last=span.last)
            continue
        if before is not None:
            yield before
        before = span
    if before is not None:
        yield before


def _squared_length(span: Span) -> torch.Tensor:
    """Return the squared Frobenius norm of the change of a span, from its factors."""
    import torch

    outputs = list(_outputs(span))
    b = (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)).double()
    # ‖BA‖² = ⟨BᵀB, AAᵀ⟩ takes r² for each row in place of its width.
    return ((b.t() @ b) * span.seen.gram).sum()


def _outputs(span: Span) -> Iterator[torch.Tensor]:
    """Yield B of each change, times its scale, for the outputs of a span: float32 ``[outputs, r]``."""
    for look in span.seen.looks:
        assert look.other is not None
        first = look.outputs[0]
        yield look.other[span.first - first : span.last - first] * look.scale

"""What each kind of delta makes of a weight, in float64, and how far off the merge's float32 may be.

No arithmetic is shared with `lora_merge.deltas`, which the merge uses: only what an adapter states is read from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, cast

from lora_merge.checks.reading import Tensors
from lora_merge.core.plan import Merge
from lora_merge.core.tensor import UNIT_ROUNDOFF

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.deltas import FactorFacts, RowsFacts

SMALLEST = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149}
"""Smallest subnormal of each stored dtype."""

# Unit roundoff of float32.
_FLOAT32 = 2.0**-24

_UNDERFLOW = 2.0**-149
"""Smallest subnormal of float32: below 2⁻¹²⁶ each of its roundings is off by up to half of that, however small the value."""

CHUNK_ROWS = 256
"""Rows of a weight that are looked at together."""

Value = tuple["torch.Tensor", "torch.Tensor"]
"""Float64 values, and the largest error that float32 may have made in each."""


@dataclass(frozen=True, slots=True)
class Site:
    """Some rows of one weight, and what a formula may have to know about its other rows."""

    reader: Tensors
    op: Merge
    rows: Sequence[int]
    """Numbers within the weight: the stored tensor, or the part of it that a delta owns."""

    stored: str
    """Dtype code of the output's values."""

    box: tuple[tuple[int, int], ...] = ()
    """The part of the stored tensor that is the weight: ranges of matrices, of their rows, of their columns; empty
    for all of it.
    """

    @property
    def n_rows(self) -> int:
        """The number of rows of the weight."""
        if not self.box:
            return self.op.view.n_rows
        (first, last), (top, bottom), _ = self.box
        return (last - first) * (bottom - top)

    @property
    def rows_of_one(self) -> int:
        """The number of rows of one matrix of the weight."""
        return self.box[1][1] - self.box[1][0] if self.box else self.op.view.rows

    def base(self, rows: Sequence[int]) -> torch.Tensor:
        """Return rows of the weight before the merge, float64 ``[rows, columns]``."""
        return self.start(rows)[0]

    def start(self, rows: Sequence[int]) -> Value:
        """Return rows of the weight before the merge, and how far off float32 may have decoded them.

        Plain tensors are exact. What a codec decodes is rounded once for each product.
        """
        source, view = self.op.source, self.op.view
        if not self.box:
            return self.reader.weight(source, rows, view.n_rows)
        (first, _), (top, _), (left, right) = self.box
        places = [divmod(row, self.rows_of_one) for row in rows]
        stored = [(first + matrix) * view.rows + top + row for matrix, row in places]
        values, off = self.reader.weight(source, stored, view.n_rows)
        return values[:, left:right], off[:, left:right]

    def inside(self, delta: PlacedDelta) -> tuple[Site, list[int]]:
        """Return the site of a delta that owns a part, with the rows as it counts them; and which of this site's rows
        they are.
        """
        columns = (0, self.op.view.columns)
        # Of a vector the box has rows only.
        box = delta.region.box if len(delta.region.box) > 1 else (*delta.region.box, columns)
        box = box if len(box) == 3 else ((0, 1), *box)
        (first, last), (top, bottom), _ = box
        rows, own = [], []
        for n, row in enumerate(self.rows):
            matrix, inner = divmod(row, self.op.view.rows)
            if first <= matrix < last and top <= inner < bottom:
                rows.append((matrix - first) * (bottom - top) + inner - top)
                own.append(n)
        return replace(self, rows=rows, box=box), own


def _low_rank(site: Site, delta: PlacedDelta, rows: Sequence[int]) -> Value:
    """Return s · Σ bᵢaᵢ, with its error: (r + 5)·2⁻²⁴·|s|·Σ|bᵢaᵢ| at most, plus underflow, plus a rounding where PEFT
    rounds it.
    """
    left, right = sides(site, delta, 0, rows)
    return _scaled(site, delta, *_multiplied(left, right), len(right))


def _stacked(site: Site, delta: PlacedDelta, rows: Sequence[int]) -> Value:
    """Return s · Σ bᵢaᵢ of each expert, for its own rows."""
    import torch

    products, magnitudes, rank = [], [], 0
    by_expert: dict[int, list[int]] = {}
    for row in rows:  # in order, so that each expert's rows are together
        expert, inside = divmod(row, site.rows_of_one)
        by_expert.setdefault(expert, []).append(inside)
    for expert, own in by_expert.items():
        left, right = sides(site, delta, expert, own)
        product, magnitude = _multiplied(left, right)
        products.append(product)
        magnitudes.append(magnitude)
        rank = len(right)
    return _scaled(site, delta, torch.cat(products), torch.cat(magnitudes), rank)


def _multiplied(left: torch.Tensor, right: torch.Tensor) -> Value:
    """Return BA and Σ|bᵢaᵢ|. The second includes an underflow of B, where the scale was multiplied into it first."""
    sizes = right.abs()
    return left @ right, (left.abs() @ sizes).add_(_UNDERFLOW / _FLOAT32 * sizes.sum(0))


def sides(
    site: Site, delta: PlacedDelta, expert: int, rows: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of the left factor that some rows of the stored weight need, and the whole right factor.

    Of stacked experts A has one after the other, B has them side by side: column by column in turn, or (Unsloth) block
    by block. What is not in the delta's part is left out.
    """
    ref_a, facts = delta.factors["A"], _factor_facts(delta)
    part, rank = delta.part, _rank(delta)
    if facts.stack is not None:
        expert, part = expert + (part[0][0] if part else 0), part[1:]
    if facts.stored_transposed:
        a = site.reader.tensor(ref_a).T
    else:
        a = site.reader.tensor(ref_a, range(expert * rank, (expert + 1) * rank))
    # AdaLoRA's diagonal.
    if "E" in delta.factors:
        a = a * site.reader.tensor(delta.factors["E"])
    a = _on_diagonal(a, facts.blocks_a or 1)
    outputs, inputs = part if len(part) > 1 else (*part, (0, a.shape[1])) if part else (None, None)
    a = a[:, slice(*inputs)] if inputs else a
    b, rows = _left(site, delta, expert, outputs, rows)
    index = slice(rows.start, rows.stop) if isinstance(rows, range) else list(rows)
    # The stored weight is the transpose, so Aᵀ is on the left.
    return (a[:, index].T, b.T) if delta.region.transposed else (b[index], a)


def _left(
    site: Site, delta: PlacedDelta, expert: int, outputs: tuple[int, int] | None, rows: Sequence[int]
) -> tuple[torch.Tensor, Sequence[int]]:
    """Return B of one expert (or of a weight without experts), and the numbers of some rows of the weight's part in
    it.

    Where they are rows of the stored tensor too, only they are read.
    """
    ref, facts, rank = delta.factors["B"], _factor_facts(delta), _rank(delta)
    packing, n_experts = (facts.stack.packing, facts.stack.experts) if facts.stack else ("interleaved", 1)
    n_blocks = facts.blocks_b or 1
    if packing == "by-expert" or n_blocks > 1 or delta.region.transposed or facts.stored_transposed:
        b = site.reader.tensor(ref)
        if packing == "by-expert":
            b = b.reshape(n_experts, -1, rank)[expert]
        else:
            b = _on_diagonal(b.T if facts.stored_transposed else b, n_blocks)
        b = b[slice(*outputs)] if outputs else b
    else:
        first = outputs[0] if outputs else 0
        b = site.reader.tensor(ref, _moved(rows, first))
        rows = range(len(rows))
    if packing == "expert-major":
        return b[:, expert * rank : (expert + 1) * rank], rows
    return (b if packing == "by-expert" else b[:, expert::n_experts]), rows


def _factor_facts(delta: PlacedDelta) -> FactorFacts:
    return cast("FactorFacts", delta.facts)


def _rank(delta: PlacedDelta) -> int:
    """Return the rank r. A stack's A has r rows for each expert."""
    facts, shape = _factor_facts(delta), delta.factors["A"].shape
    return shape[-1 if facts.stored_transposed else 0] // (facts.stack.experts if facts.stack else 1)


def _moved(rows: Sequence[int], by: int) -> Sequence[int]:
    return range(rows.start + by, rows.stop + by) if isinstance(rows, range) else [by + row for row in rows]


def _scaled(
    site: Site, delta: PlacedDelta, product: torch.Tensor, magnitude: torch.Tensor, rank: int
) -> Value:
    scale = delta.effective_scale
    # In place: they were made for this, and passes over all values take time.
    change, error = product.mul_(scale), magnitude.mul_((rank + 5) * _FLOAT32 * abs(scale))
    # Each of the products and sums may underflow once.
    error += (abs(scale) * rank + 2) * _UNDERFLOW
    # PEFT rounds this delta to the weight's dtype before it adds it.
    if delta.rounded:
        error += UNIT_ROUNDOFF[site.stored] * change.abs() + SMALLEST[site.stored]
    # PEFT rounds the weight here, before the next delta: half a unit of the sum's size.
    if delta.round_before_next:
        error += (
            UNIT_ROUNDOFF[site.stored] * (site.base(site.rows).abs() + change.abs()) + SMALLEST[site.stored]
        )
    return change, error


def _on_diagonal(factor: torch.Tensor, n_blocks: int) -> torch.Tensor:
    """Return the block-diagonal matrix of a factor whose blocks are stored one above the other (BD-LoRA)."""
    if n_blocks == 1:
        return factor
    height, width = len(factor) // n_blocks, factor.shape[1]
    laid_out = factor.new_zeros(len(factor), width * n_blocks)
    for n in range(n_blocks):
        part = slice(n * height, (n + 1) * height)
        laid_out[part, n * width : (n + 1) * width] = factor[part]
    return laid_out


def _sum(site: Site, delta: PlacedDelta, rows: Sequence[int], current: Value) -> Value:
    """Return the weight with s · BA added."""
    formula = _stacked if delta.facts.is_stacked else _low_rank
    return plus(current, formula(site, delta, rows))


def plus(one: Value, other: Value) -> Value:
    """Return the sum of two values. Float32 rounds it once."""
    sizes = one[0].abs().add_(other[0].abs())
    return one[0] + other[0], sizes.mul_(_FLOAT32).add_(one[1] + other[1])


def _dora(site: Site, delta: PlacedDelta, rows: Sequence[int], current: Value) -> Value:
    """Return m/‖V‖ · (current + s·BA). The norm of N values is off by at most N·2⁻²⁴ of itself, and by what V is off."""
    magnitude = site.reader.tensor(delta.factors["magnitude"]).flatten()
    magnitude = magnitude[slice(*delta.part[0])] if delta.part else magnitude
    change = _low_rank(site, delta, rows)
    # Stored [in, out]: an output is a column, so its norm needs all rows of the weight.
    if delta.region.transposed:
        norm, norm_off, length = *_column_norms(site, delta), site.n_rows
        factor = magnitude / norm
    else:
        v, v_off = plus(site.start(rows), change)
        norm, norm_off, length = v.norm(dim=1, keepdim=True), v_off.norm(dim=1, keepdim=True), v.shape[1]
        factor = magnitude[rows].view(-1, 1) / norm
    value, off = plus(current, change)
    relative = norm_off / norm + (length + 6) * _FLOAT32
    return factor * value, factor.abs() * off + (factor * value).abs() * relative + _UNDERFLOW


def _column_norms(site: Site, delta: PlacedDelta) -> Value:
    """Return ‖V‖ of each column, over all rows of the weight, and its error."""
    n_rows = site.n_rows
    squares = site.base([0]).zero_()[0]
    wrongs = squares.clone()
    for at in range(0, n_rows, CHUNK_ROWS):
        rows = range(at, min(at + CHUNK_ROWS, n_rows))
        # V is the base plus this adapter's own change, whatever other adapters did before (PEFT's forward
        # pass).
        v, wrong = plus(site.start(rows), _low_rank(site, delta, rows))
        squares += v.square().sum(dim=0)
        wrongs += wrong.square().sum(dim=0)
    return squares.sqrt(), wrongs.sqrt()


def _addition(site: Site, delta: PlacedDelta, rows: Sequence[int], current: Value) -> Value:
    """Return the weight with s · D added."""
    first = delta.part[0][0] if delta.part else 0
    change = delta.scale * site.reader.tensor(delta.factors["addend"])[[first + row for row in rows]]
    return plus(current, (change, _FLOAT32 * change.abs() + _UNDERFLOW))


def _rows(site: Site, delta: PlacedDelta, rows: Sequence[int], current: Value) -> Value:
    """Return the weight with some rows replaced by trained ones, which are exact."""
    value, off = current[0].clone(), current[1].clone()
    trained = site.reader.tensor(delta.factors["rows"])
    places = {index: n for n, index in enumerate(cast("RowsFacts", delta.facts).indices)}
    for n, row in enumerate(rows):
        if row in places:
            value[n], off[n] = trained[places[row]], 0.0
    return value, off


FORMULAS: Mapping[str, Callable[[Site, PlacedDelta, Sequence[int], Value], Value]] = {
    "low_rank": _sum,
    "stacked": _sum,
    "dora": _dora,
    "addition": _addition,
    "rows": _rows,
}
"""By algebra. This table is apart from `lora_merge.deltas.ALGEBRAS` on purpose: of an algebra that is missing here, nothing is
recomputed, and verification says so."""


def changed(site: Site, deltas: Sequence[PlacedDelta], start: Value) -> Value:
    """Return the rows with every delta applied in turn to what they are before, each by its adapter's weight."""
    value = start
    for delta in deltas:
        after = _after(site, delta, value)
        # The change that the delta makes is weighted, not the value that it leaves.
        if delta.adapter_weight == 1 or after is value:
            value = after
        else:
            value = plus(value, times(delta.adapter_weight, minus(after, value)))
    return value


def _after(site: Site, delta: PlacedDelta, value: Value) -> Value:
    """Return the rows with one delta applied, in its own part of them."""
    if not delta.region.box:
        return FORMULAS[delta.algebra](site, delta, site.rows, value)
    inner, own = site.inside(delta)
    if not own:
        return value
    changed = value[0].clone(), value[1].clone()
    left, right = inner.box[2]
    part = value[0][own, left:right], value[1][own, left:right]
    for whole, new in zip(changed, FORMULAS[delta.algebra](inner, delta, inner.rows, part), strict=True):
        whole[own, left:right] = new
    return changed


def minus(one: Value, other: Value) -> Value:
    """Return the difference of two values. Float32 rounds it once."""
    return plus(one, (-other[0], other[1]))


def times(factor: float, value: Value) -> Value:
    """Return a multiple of a value. Float32 rounds it once."""
    return factor * value[0], abs(factor) * (value[1] + _FLOAT32 * value[0].abs()) + _UNDERFLOW


def combined(site: Site, start: Value) -> list[Value]:
    """Return every value that a combination may have given an element.

    Each is the base plus the sum of some adapters' changes (dare), or their mean (ties), scaled up where the
    others were dropped at random; which adapters, trimming, signs and chance decide.
    """
    how = site.op.combination
    assert how is not None
    changes = []
    for adapter in sorted({delta.adapter for delta in site.op.deltas}):
        own = [delta for delta in site.op.deltas if delta.adapter == adapter]
        alone = changed(site, [replace(delta, adapter_weight=1.0) for delta in own], start)
        changes.append(times(own[0].adapter_weight, minus(alone, start)))
    found = []
    # Every subset of the adapters, the empty one too: all changes of an element may have been dropped.
    for some in (some for n in range(len(changes) + 1) for some in combinations(changes, n)):
        # DARE scales what it keeps by 1 / density.
        share = 1.0 if how.method == "ties" else 1.0 / how.density
        share /= max(len(some), 1) if how.method != "dare_linear" else 1
        value = start
        for change in some:
            value = plus(value, times(share, change))
        found.append(value)
    return found

"""Are the merged values right? Recomputed in float64 by naive code that shares nothing with the merge.

Files are parsed anew, rows are whole, and the formula is written out.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lora_merge.core.plan import Merge
from lora_merge.core.report import error, note
from lora_merge.core.tensor import TORCH_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from lora_merge.checks.evidence import Evidence
    from lora_merge.core.adapter import DeltaSpec
    from lora_merge.core.report import Issue
    from lora_merge.core.tensor import TensorRef

_ROUNDOFF = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
"""Unit roundoff of each stored dtype: half the gap between 1 and the next number."""

_SMALLEST = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149}
"""Smallest subnormal of each stored dtype."""

_FLOAT32 = 2.0**-24

_CHUNK_ROWS = 256

_MOST_COMBINED = 6
"""Adapters of a combination that is recomputed: a value may be of any subset of them."""


def recompute(evidence: Evidence) -> Iterator[Issue]:
    """Yield an issue for each merged tensor with a row that differs from the float64 formula.

    Level ``sample`` takes the first row, the last and one in between; ``full`` takes all. What PEFT's own layers
    merged has no formula here; the check of their outputs covers it.
    """
    with contextlib.ExitStack() as stack:
        reader = _Reader(stack)
        unproved = [
            step.slots[0].name
            for step in evidence.plan.steps
            if isinstance(step.op, Merge) and step.op.combination is not None and not has_formula(step.op)
        ]
        if unproved:
            sentence = (
                f"and {len(unproved) - 1} more: what was combined there cannot be recomputed row by row"
            )
            yield note("not-recomputed", unproved[0], sentence)
        for step in evidence.plan.steps:
            if isinstance(step.op, Merge) and has_formula(step.op):
                for rows in sampled_rows(step.slots[0], step.op, evidence.level):
                    problem = _compare(reader, evidence, step.op, step.slots[0], rows)
                    if problem is not None:
                        yield problem
                        break


def has_formula(op: Merge) -> bool:
    """Return True when every delta of a step is one that is written out here."""
    n_adapters = len({delta.adapter for delta in op.deltas})
    if op.combination is not None and (op.combination.method == "svd" or n_adapters > _MOST_COMBINED):
        return False
    return all(delta.kind in _FORMULAS for delta in op.deltas)


def sampled_rows(slot: TensorRef, op: Merge, level: str) -> list[list[int]]:
    """Return the rows to recompute, in chunks. The one in between is drawn from the name: always the same."""
    n_rows = op.view.n_rows
    if level == "full":
        return [list(range(at, min(at + _CHUNK_ROWS, n_rows))) for at in range(0, n_rows, _CHUNK_ROWS)]
    drawn = zlib.crc32(slot.name.encode()) % max(n_rows, 1)
    return [sorted({0, drawn, n_rows - 1})] if n_rows else []


class _Reader:
    """Rows of stored tensors as float64, by a reader of its own: plain reads, no mapping of the files."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._open: dict[str, tuple[BinaryIO, dict[str, Any], int]] = {}

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        """Return a whole tensor, one row for each entry of its first axis."""
        stream, _, _ = self._file(ref.file)
        stream.seek(ref.start)
        return _doubles(stream.read(ref.nbytes), self._dtype_at(ref), ref.shape[0])

    def source(self, ref: TensorRef, rows: Sequence[int], n_rows: int) -> torch.Tensor:
        """Return some rows of a tensor that is read by its place: an adapter may spell its name otherwise."""
        stream, _, _ = self._file(ref.file)
        n_bytes, parts = ref.nbytes // n_rows, []
        for index in rows:
            stream.seek(ref.start + index * n_bytes)
            parts.append(stream.read(n_bytes))
        return _doubles(b"".join(parts), self._dtype_at(ref), len(rows))

    def _dtype_at(self, ref: TensorRef) -> str:
        """Return the dtype that the file's header gives what begins at a place."""
        _, header, data_start = self._file(ref.file)
        spans = (
            (row["data_offsets"], row["dtype"]) for name, row in header.items() if name != "__metadata__"
        )
        return next(str(dtype) for (begin, end), dtype in spans if begin <= ref.start - data_start < end)

    def rows(self, file: str, name: str, rows: Sequence[int], n_rows: int) -> torch.Tensor:
        """Return some rows of a tensor that is seen as so many: ``[len(rows), …]``."""
        stream, _, data_start = self._file(file)
        row = self._row(file, name)
        begin, end = row["data_offsets"]
        n_bytes = (end - begin) // n_rows
        parts = []
        for index in rows:
            stream.seek(data_start + begin + index * n_bytes)
            parts.append(stream.read(n_bytes))
        return _doubles(b"".join(parts), row["dtype"], len(rows))

    def _row(self, file: str, name: str) -> dict[str, Any]:
        row: dict[str, Any] = self._file(file)[1][name]
        return row

    def _file(self, file: str) -> tuple[BinaryIO, dict[str, Any], int]:
        """Return an open file, its header and where its data begins."""
        if file not in self._open:
            stream = self._stack.enter_context(Path(file).open("rb"))  # noqa: SIM115 - the stack closes it
            length = int.from_bytes(stream.read(8), "little")
            self._open[file] = (stream, json.loads(stream.read(length)), 8 + length)
        return self._open[file]


def _doubles(content: bytes, dtype: str, n_rows: int) -> torch.Tensor:
    """Return stored values as float64 ``[n_rows, …]``."""
    import torch

    values = torch.frombuffer(bytearray(content), dtype=getattr(torch, TORCH_NAMES[dtype]))
    return values.double().view(n_rows, -1)


@dataclass(frozen=True, slots=True)
class _Site:
    """Some rows of one weight, and all that a formula may need to know about the rest of it."""

    reader: _Reader
    op: Merge
    rows: list[int]
    stored: str
    """Dtype code of the output."""

    def base(self, rows: Sequence[int]) -> torch.Tensor:
        """Return rows of the weight before the merge."""
        return self.reader.source(self.op.parts[0], rows, self.op.view.n_rows)


_Value = tuple["torch.Tensor", "torch.Tensor"]
"""Some values, and by how much float32 may have got them wrong."""


def _low_rank(site: _Site, delta: DeltaSpec, rows: Sequence[int]) -> _Value:
    """Return s · Σ bᵢaᵢ: off by at most (r + 4)·2⁻²⁴·|s|·Σ|bᵢaᵢ|, and by a rounding where PEFT rounds it."""
    a, b = (site.reader.tensor(delta.tensors[role]) for role in ("A", "B"))
    if delta.options.get("turned"):  # stored [in, r] and [r, out]
        a, b = a.T, b.T
    if "E" in delta.tensors:
        a = a * site.reader.tensor(delta.tensors["E"])
    a, b = (
        _on_diagonal(factor, int(delta.options.get(key, 1)))
        for factor, key in ((a, "blocks_A"), (b, "blocks_B"))
    )
    left, right = (a[:, rows].T, b.T) if delta.region.transposed else (b[rows], a)
    return _scaled(site, delta, left @ right, left.abs() @ right.abs(), len(a))


def _stacked(site: _Site, delta: DeltaSpec, rows: Sequence[int]) -> _Value:
    """Return each expert's own s · Σ bᵢaᵢ; A has the experts one after the other, B has them side by side."""
    import torch

    a, b = (site.reader.tensor(delta.tensors[role]) for role in ("A", "B"))
    n_experts = site.op.view.blocks
    rank = len(a) // n_experts
    products, magnitudes = [], []
    for row in rows:
        expert, inside = divmod(row, site.op.view.rows)
        own_a, own_b = a[expert * rank : (expert + 1) * rank], b[:, expert::n_experts]
        left, right = (own_a[:, inside], own_b.T) if delta.region.transposed else (own_b[inside], own_a)
        products.append(left @ right)
        magnitudes.append(left.abs() @ right.abs())
    return _scaled(site, delta, torch.stack(products), torch.stack(magnitudes), rank)


def _scaled(
    site: _Site, delta: DeltaSpec, product: torch.Tensor, magnitude: torch.Tensor, rank: int
) -> _Value:
    scale = delta.scale / delta.options.get("divisor", 1.0)
    change, error = scale * product, (rank + 5) * _FLOAT32 * abs(scale) * magnitude
    if delta.rounded:
        error += _ROUNDOFF[site.stored] * change.abs() + _SMALLEST[site.stored]
    if delta.options.get("settles"):
        error += _ROUNDOFF[site.stored] * (site.base(site.rows).abs() + change.abs()) + _SMALLEST[site.stored]
    return change, error


def _on_diagonal(factor: torch.Tensor, n_blocks: int) -> torch.Tensor:
    """Return a factor whose blocks are stored one above the other as the matrix that they stand for."""
    if n_blocks == 1:
        return factor
    height, width = len(factor) // n_blocks, factor.shape[1]
    laid_out = factor.new_zeros(len(factor), width * n_blocks)
    for n in range(n_blocks):
        part = slice(n * height, (n + 1) * height)
        laid_out[part, n * width : (n + 1) * width] = factor[part]
    return laid_out


def _sum(site: _Site, delta: DeltaSpec, rows: Sequence[int], current: _Value) -> _Value:
    """Return a weight with s · BA added."""
    formula = _stacked if delta.kind == "stacked" else _low_rank
    return _plus(current, formula(site, delta, rows))


def _plus(one: _Value, other: _Value) -> _Value:
    """Return a sum, which float32 rounds once."""
    return one[0] + other[0], one[1] + other[1] + _FLOAT32 * (one[0].abs() + other[0].abs())


def _dora(site: _Site, delta: DeltaSpec, rows: Sequence[int], current: _Value) -> _Value:
    """Return m/‖V‖ · (current + s·BA): the norm of N values is off by at most N·2⁻²⁴ of it, and by what V is off."""
    magnitude = site.reader.tensor(delta.tensors["magnitude"]).flatten()
    change = _low_rank(site, delta, rows)
    if delta.region.transposed:
        norm, norm_off, length = *_column_norms(site, delta), site.op.view.n_rows
        factor = magnitude / norm
    else:
        base = site.base(rows)
        v, v_off = _plus((base, base.new_zeros(base.shape)), change)
        norm, norm_off, length = v.norm(dim=1, keepdim=True), v_off.norm(dim=1, keepdim=True), v.shape[1]
        factor = magnitude[rows].view(-1, 1) / norm
    value, off = _plus(current, change)
    relative = norm_off / norm + (length + 6) * _FLOAT32
    return factor * value, factor.abs() * off + (factor * value).abs() * relative


def _column_norms(site: _Site, delta: DeltaSpec) -> _Value:
    """Return ‖V‖ of each column, and by how much it may be off, from all rows of the weight."""
    n_rows = site.op.view.n_rows
    squares = site.base([0]).zero_()[0]
    wrongs = squares.clone()
    for at in range(0, n_rows, _CHUNK_ROWS):
        rows = range(at, min(at + _CHUNK_ROWS, n_rows))
        base = site.base(rows)
        v, wrong = _plus((base, base.new_zeros(base.shape)), _low_rank(site, delta, rows))
        squares += v.square().sum(dim=0)
        wrongs += wrong.square().sum(dim=0)
    return squares.sqrt(), wrongs.sqrt()


def _addition(site: _Site, delta: DeltaSpec, rows: Sequence[int], current: _Value) -> _Value:
    """Return a weight with s · D added."""
    change = delta.scale * site.reader.tensor(delta.tensors["addend"])[rows]
    return _plus(current, (change, _FLOAT32 * change.abs()))


def _rows(site: _Site, delta: DeltaSpec, rows: Sequence[int], current: _Value) -> _Value:
    """Return a weight with some rows replaced."""
    value, off = current[0].clone(), current[1].clone()
    trained = site.reader.tensor(delta.tensors["rows"])
    places = {int(index): n for n, index in enumerate(delta.options["indices"])}
    for n, row in enumerate(rows):
        if row in places:
            value[n], off[n] = trained[places[row]], 0.0
    return value, off


_FORMULAS: Mapping[str, Callable[[_Site, DeltaSpec, Sequence[int], _Value], _Value]] = {
    "low_rank": _sum,
    "stacked": _sum,
    "dora": _dora,
    "addition": _addition,
    "rows": _rows,
}


def _compare(
    reader: _Reader, evidence: Evidence, op: Merge, slot: TensorRef, rows: list[int]
) -> Issue | None:
    """Return an issue when some rows are further from the formula than rounding can carry them.

    With u the unit roundoff of the stored dtype and e what float32 may be off by, a stored value of x is off by at
    most u·|x| + (1 + u)·e, plus half a subnormal.
    """
    import torch

    site = _Site(reader, op, rows, slot.dtype)
    stored = reader.rows(str(evidence.root / slot.file), slot.name, rows, op.view.n_rows)
    candidates = _combined(site) if op.combination is not None else [_changed(site, op.deltas)]
    roundoff = _ROUNDOFF[slot.dtype]
    wrong = stored.new_ones(stored.shape, dtype=torch.bool)
    for exact, off in candidates:
        bound = roundoff * exact.abs() + (1 + roundoff) * off + _SMALLEST[slot.dtype] / 2
        wrong &= ~((stored - exact).abs() <= bound)  # negated, so that NaN is wrong
    if not wrong.any():
        return None
    at_row, at_column = (int(index) for index in wrong.nonzero()[0])
    got, wanted = float(stored[at_row, at_column]), float(candidates[-1][0][at_row, at_column])
    where = f"row {rows[at_row]}, column {at_column}"
    return error("wrong-value", slot.name, f"{where} is {got:.9g}, expected {wanted:.9g}")


def _changed(site: _Site, deltas: Sequence[DeltaSpec]) -> _Value:
    """Return the rows with every delta applied in turn, each by its weight."""
    base = site.base(site.rows)
    value: _Value = (base, base.new_zeros(base.shape))
    for delta in deltas:
        after = _FORMULAS[delta.kind](site, delta, site.rows, value)
        part = _times(delta.weight, _minus(after, value))
        value = after if delta.weight == 1 else _plus(value, part)
    return value


def _minus(one: _Value, other: _Value) -> _Value:
    return _plus(one, (-other[0], other[1]))


def _times(factor: float, value: _Value) -> _Value:
    return factor * value[0], abs(factor) * (value[1] + _FLOAT32 * value[0].abs())


def _combined(site: _Site) -> list[_Value]:
    """Return every value that a combination may have chosen, element by element.

    Each is the base plus the sum of some adapters' changes (dare), or their mean (ties), scaled up where the
    others were dropped at random; which adapters, trimming, signs and chance decide.
    """
    how = site.op.combination
    assert how is not None
    base = site.base(site.rows)
    start: _Value = (base, base.new_zeros(base.shape))
    changes = []
    for adapter in sorted({delta.adapter for delta in site.op.deltas}):
        own = [delta for delta in site.op.deltas if delta.adapter == adapter]
        alone = _changed(site, [replace(delta, weight=1.0) for delta in own])
        changes.append(_times(own[0].weight, _minus(alone, start)))
    found = []
    for some in (some for n in range(len(changes) + 1) for some in combinations(changes, n)):
        share = 1.0 if how.method == "ties" else 1.0 / how.density
        share /= max(len(some), 1) if how.method != "dare_linear" else 1
        value = start
        for change in some:
            value = _plus(value, _times(share, change))
        found.append(value)
    return found

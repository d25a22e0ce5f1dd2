"""Are the merged values right? Recomputed in float64 by naive code that shares nothing with the merge.

Files are parsed anew, rows are whole, and the formula is written out.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import zlib
from dataclasses import dataclass, replace
from itertools import combinations
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lora_merge.core.plan import Merge
from lora_merge.core.report import error, note
from lora_merge.core.shortage import not_for_want_of_memory
from lora_merge.core.tensor import TORCH_NAMES, UNIT_ROUNDOFF
from lora_merge.errors import CheckpointError
from lora_merge.words import of_several

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch

    from lora_merge.checks.evidence import Evidence
    from lora_merge.core.adapter import DeltaSpec
    from lora_merge.core.report import Issue
    from lora_merge.core.tensor import TensorRef

_SMALLEST = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149}
"""Smallest subnormal of each stored dtype."""

_FLOAT32 = 2.0**-24

_CHUNK_ROWS = 256

_MOST_PARTS = 64
"""Parts of one tensor that are sampled."""

_ZIP_MAGIC = b"PK\x03\x04"

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
            why = "combined in a way that cannot be recomputed row by row"
            sentence = of_several(len(unproved), f"was {why}", f"were {why}")
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
    """Return the rows to recompute, in chunks.

    The one in between is drawn from the name: always the same. Of stacked experts one row of each is taken, and where
    deltas have parts of their own one row of each part; of up to `_MOST_PARTS`.
    """
    n_rows = op.view.n_rows
    if level == "full":
        return [list(range(at, min(at + _CHUNK_ROWS, n_rows))) for at in range(0, n_rows, _CHUNK_ROWS)]
    drawn = zlib.crc32(slot.name.encode())
    rows = {0, drawn % max(n_rows, 1), n_rows - 1}
    for matrix in range(0, op.view.blocks, -(-op.view.blocks // _MOST_PARTS)) if op.view.blocks > 1 else ():
        rows.add(matrix * op.view.rows + drawn % max(op.view.rows, 1))
    parts = [delta.region.at for delta in op.deltas if delta.region.at]
    for at in parts[:: max(1, -(-len(parts) // _MOST_PARTS))]:
        matrix = at[0][0] if len(at) == 3 else 0
        top, bottom = at[-2] if len(at) > 1 else at[0]
        rows.add(matrix * op.view.rows + top + drawn % (bottom - top))
    return [sorted(rows)] if n_rows else []


class _Reader:
    """Rows of stored tensors as float64, by a reader of its own."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._open: dict[str, _Safetensors | _Pickled] = {}
        self._last: tuple[TensorRef, torch.Tensor] | None = None

    def tensor(self, ref: TensorRef, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Return a whole tensor, one row for each entry of its first axis; or some rows of it.

        The last whole one is kept: each expert of a stack asks for the same.
        """
        if rows is not None:
            return self.source(ref, rows, ref.shape[0])
        if self._last is None or self._last[0] != ref:
            self._last = ref, self.source(ref, range(ref.shape[0]), ref.shape[0])
        return self._last[1]

    def source(self, ref: TensorRef, rows: Sequence[int], n_rows: int) -> torch.Tensor:
        """Return some rows of a tensor of base or adapter, whose file may spell its name otherwise than the plan."""
        return self._file(ref.file).source(ref, rows, n_rows)

    def rows(self, file: str, name: str, rows: Sequence[int], n_rows: int) -> torch.Tensor:
        """Return some rows of a tensor of the output, which is seen as so many: ``[len(rows), …]``."""
        return self._file(file).rows(name, rows, n_rows)

    def _file(self, file: str) -> _Safetensors | _Pickled:
        if file not in self._open:
            stream = self._stack.enter_context(Path(file).open("rb"))  # noqa: SIM115 - the stack closes it
            is_pickled = stream.read(4) == _ZIP_MAGIC
            self._open[file] = _Pickled(file, stream) if is_pickled else _Safetensors(stream)
        return self._open[file]


class _Safetensors:
    """A safetensors file: plain reads, no mapping."""

    def __init__(self, stream: BinaryIO) -> None:
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        self._stream, self._header, self._data_start = stream, json.loads(stream.read(length)), 8 + length
        self._spans = sorted(
            (*row["data_offsets"], row["dtype"])
            for name, row in self._header.items()
            if name != "__metadata__"
        )

    def rows(self, name: str, rows: Sequence[int], n_rows: int) -> torch.Tensor:
        row = self._header[name]
        begin, end = row["data_offsets"]
        start = self._data_start + begin
        return _read(self._stream, start, (end - begin) // n_rows, rows, row["dtype"])

    def source(self, ref: TensorRef, rows: Sequence[int], n_rows: int) -> torch.Tensor:
        at = ref.start - self._data_start
        spans = self._spans[bisect.bisect_right(self._spans, (at, inf, "")) - 1 :]
        dtype = next(str(dtype) for begin, end, dtype in spans if begin <= at < end)
        return _read(self._stream, ref.start, ref.nbytes // n_rows, rows, dtype)


class _Pickled:
    """A file of ``torch.save``, as torch itself reads it; the mapping is touched only where rows are taken."""

    def __init__(self, file: str, stream: BinaryIO) -> None:
        import pickle

        import torch

        self._stream = stream
        try:
            self._tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError) as exc:
            not_for_want_of_memory(exc)
            raise CheckpointError(file, "", f"torch cannot load it ({exc})"[:300]) from exc

    def rows(self, name: str, rows: Sequence[int], n_rows: int) -> torch.Tensor:
        values: torch.Tensor = self._tensors[name].detach().reshape(n_rows, -1)[list(rows)].double()
        return values

    def source(self, ref: TensorRef, rows: Sequence[int], n_rows: int) -> torch.Tensor:
        if ref.name in self._tensors:
            return self.rows(ref.name, rows, n_rows)
        return _read(self._stream, ref.start, ref.nbytes // n_rows, rows, ref.dtype)


def _read(stream: BinaryIO, start: int, n_bytes: int, rows: Sequence[int], dtype: str) -> torch.Tensor:
    """Return rows of so many bytes each, read at their places."""
    parts = []
    for first, last in _runs(rows):
        stream.seek(start + first * n_bytes)
        parts.append(stream.read((last - first) * n_bytes))
    return _doubles(b"".join(parts), dtype, len(rows))


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Return rows as ranges of adjacent ones."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs


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
    """Counted in the weight: in the stored tensor, or in the part of it that a delta owns."""

    stored: str
    """Dtype code of the output."""

    at: tuple[tuple[int, int], ...] = ()
    """The part that is the weight: a range of matrices, of their rows, of their columns; empty for everything."""

    @property
    def n_rows(self) -> int:
        """Return the rows of the weight."""
        if not self.at:
            return self.op.view.n_rows
        (first, last), (top, bottom), _ = self.at
        return (last - first) * (bottom - top)

    @property
    def rows_of_one(self) -> int:
        """Return the rows of one matrix of the weight."""
        return self.at[1][1] - self.at[1][0] if self.at else self.op.view.rows

    def base(self, rows: Sequence[int]) -> torch.Tensor:
        """Return rows of the weight before the merge."""
        source, view = self.op.parts[0], self.op.view
        if not self.at:
            return self.reader.source(source, rows, view.n_rows)
        (first, _), (top, _), (left, right) = self.at
        places = [divmod(row, self.rows_of_one) for row in rows]
        stored = [(first + matrix) * view.rows + top + row for matrix, row in places]
        return self.reader.source(source, stored, view.n_rows)[:, left:right]

    def inside(self, delta: DeltaSpec) -> tuple[_Site, list[int]]:
        """Return the same rows as a delta with a part of its own counts them, and which of them are its."""
        columns = (0, self.op.view.columns)
        at = delta.region.at if len(delta.region.at) > 1 else (*delta.region.at, columns)
        at = at if len(at) == 3 else ((0, 1), *at)
        (first, last), (top, bottom), _ = at
        rows, own = [], []
        for n, row in enumerate(self.rows):
            matrix, inner = divmod(row, self.op.view.rows)
            if first <= matrix < last and top <= inner < bottom:
                rows.append((matrix - first) * (bottom - top) + inner - top)
                own.append(n)
        return replace(self, rows=rows, at=at), own


_Value = tuple["torch.Tensor", "torch.Tensor"]
"""Some values, and by how much float32 may have got them wrong."""


def _low_rank(site: _Site, delta: DeltaSpec, rows: Sequence[int]) -> _Value:
    """Return s · Σ bᵢaᵢ: off by at most (r + 4)·2⁻²⁴·|s|·Σ|bᵢaᵢ|, and by a rounding where PEFT rounds it."""
    left, right = _sides(site, delta, 0, rows)
    return _scaled(site, delta, left @ right, left.abs() @ right.abs(), len(right))


def _stacked(site: _Site, delta: DeltaSpec, rows: Sequence[int]) -> _Value:
    """Return each expert's own s · Σ bᵢaᵢ."""
    import torch

    products, magnitudes, rank = [], [], 0
    by_expert: dict[int, list[int]] = {}
    for row in rows:  # in order, so that each expert's rows are together
        expert, inside = divmod(row, site.rows_of_one)
        by_expert.setdefault(expert, []).append(inside)
    for expert, own in by_expert.items():
        left, right = _sides(site, delta, expert, own)
        products.append(left @ right)
        magnitudes.append(left.abs() @ right.abs())
        rank = len(right)
    return _scaled(site, delta, torch.cat(products), torch.cat(magnitudes), rank)


def _sides(
    site: _Site, delta: DeltaSpec, expert: int, rows: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of the left factor that some rows of the stored weight need, and the right factor.

    Of stacked experts A has one after the other, B has them side by side: column by column in turn, or (Unsloth) block
    by block. What is not in the delta's part is left out.
    """
    ref_a = delta.tensors["A"]
    n_experts = int(delta.options.get("experts", 1))
    part = delta.part
    if "experts" in delta.options:
        expert, part = expert + (part[0][0] if part else 0), part[1:]
    rank = delta.shape("A")[0] // n_experts
    turned = bool(delta.options.get("turned"))  # stored [in, r] and [r, out]
    if turned:
        a = site.reader.tensor(ref_a).T
    else:
        a = site.reader.tensor(ref_a, range(expert * rank, (expert + 1) * rank))
    if "E" in delta.tensors:
        a = a * site.reader.tensor(delta.tensors["E"])
    a = _on_diagonal(a, int(delta.options.get("blocks_A", 1)))
    outputs, inputs = part if len(part) > 1 else (*part, (0, a.shape[1])) if part else (None, None)
    a = a[:, slice(*inputs)] if inputs else a
    b, rows = _left(site, delta, expert, outputs, rows)
    return (a[:, list(rows)].T, b.T) if delta.region.transposed else (b[list(rows)], a)


def _left(
    site: _Site, delta: DeltaSpec, expert: int, outputs: tuple[int, int] | None, rows: Sequence[int]
) -> tuple[torch.Tensor, Sequence[int]]:
    """Return B of one expert, or of a weight without experts, and where in it some rows of the weight's part are.

    Where they are rows of the stored tensor too, only they are read.
    """
    ref, packing = delta.tensors["B"], delta.options.get("packing")
    n_experts, n_blocks = int(delta.options.get("experts", 1)), int(delta.options.get("blocks_B", 1))
    turned = bool(delta.options.get("turned"))
    rank = delta.shape("A")[0] // n_experts
    if packing == "by-expert" or n_blocks > 1 or delta.region.transposed or turned:
        b = site.reader.tensor(ref)
        if packing == "by-expert":
            b = b.reshape(n_experts, -1, rank)[expert]
        else:
            b = _on_diagonal(b.T if turned else b, n_blocks)
        b = b[slice(*outputs)] if outputs else b
    else:
        first = outputs[0] if outputs else 0
        b = site.reader.tensor(ref, [first + row for row in rows])
        rows = range(len(rows))
    if packing == "expert-major":
        return b[:, expert * rank : (expert + 1) * rank], rows
    return (b if packing == "by-expert" else b[:, expert::n_experts]), rows


def _scaled(
    site: _Site, delta: DeltaSpec, product: torch.Tensor, magnitude: torch.Tensor, rank: int
) -> _Value:
    scale = delta.scale / delta.options.get("divisor", 1.0)
    change, error = scale * product, (rank + 5) * _FLOAT32 * abs(scale) * magnitude
    if delta.rounded:
        error += UNIT_ROUNDOFF[site.stored] * change.abs() + _SMALLEST[site.stored]
    if delta.options.get("settles"):
        error += (
            UNIT_ROUNDOFF[site.stored] * (site.base(site.rows).abs() + change.abs()) + _SMALLEST[site.stored]
        )
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
    magnitude = magnitude[slice(*delta.part[0])] if delta.part else magnitude
    change = _low_rank(site, delta, rows)
    if delta.region.transposed:
        norm, norm_off, length = *_column_norms(site, delta), site.n_rows
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
    n_rows = site.n_rows
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
    first = delta.part[0][0] if delta.part else 0
    change = delta.scale * site.reader.tensor(delta.tensors["addend"])[[first + row for row in rows]]
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
    roundoff = UNIT_ROUNDOFF[slot.dtype]
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
        after = _after(site, delta, value)
        if delta.weight == 1 or after is value:
            value = after
        else:
            value = _plus(value, _times(delta.weight, _minus(after, value)))
    return value


def _after(site: _Site, delta: DeltaSpec, value: _Value) -> _Value:
    """Return the rows with one delta applied, in its own part of them."""
    if not delta.region.at:
        return _FORMULAS[delta.kind](site, delta, site.rows, value)
    inner, own = site.inside(delta)
    if not own:
        return value
    changed = value[0].clone(), value[1].clone()
    left, right = inner.at[2]
    part = value[0][own, left:right], value[1][own, left:right]
    for whole, new in zip(changed, _FORMULAS[delta.kind](inner, delta, inner.rows, part), strict=True):
        whole[own, left:right] = new
    return changed


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

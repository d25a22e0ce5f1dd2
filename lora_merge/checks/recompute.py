"""Are the merged values right? Recomputed in float64 by naive code that shares nothing with the merge.

Files are read with the safetensors library, rows are whole, and the formula is written out.
"""

from __future__ import annotations

import contextlib
import zlib
from typing import TYPE_CHECKING, Any

from lora_merge.core.plan import Merge
from lora_merge.core.report import error

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from lora_merge.checks.evidence import Evidence
    from lora_merge.core.report import Issue
    from lora_merge.core.tensor import TensorRef

_ROUNDOFF = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
"""Unit roundoff of each stored dtype: half the gap between 1 and the next number."""

_SMALLEST = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149}
"""Smallest subnormal of each stored dtype."""

_CHUNK_ROWS = 256


def recompute(evidence: Evidence) -> Iterator[Issue]:
    """Yield an issue for each merged tensor with a row that differs from the float64 formula.

    Level ``sample`` takes the first row, the last and one in between; ``full`` takes all.
    """
    with contextlib.ExitStack() as stack:
        reader = _Reader(stack)
        for step in evidence.plan.steps:
            if isinstance(step.op, Merge):
                for rows in sampled_rows(step.slots[0], evidence.level):
                    problem = _compare(reader, evidence, step.op, step.slots[0], rows)
                    if problem is not None:
                        yield problem
                        break


def sampled_rows(slot: TensorRef, level: str) -> list[list[int]]:
    """Return the rows to recompute, in chunks. The one in between is drawn from the name: always the same."""
    n_rows = slot.shape[0] if slot.shape else 0
    if level == "full":
        return [list(range(at, min(at + _CHUNK_ROWS, n_rows))) for at in range(0, n_rows, _CHUNK_ROWS)]
    drawn = zlib.crc32(slot.name.encode()) % max(n_rows, 1)
    return [sorted({0, drawn, n_rows - 1})] if n_rows else []


class _Reader:
    """Rows of stored tensors as float64, through the safetensors library."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._open: dict[str, Any] = {}

    def tensor(self, file: str, name: str) -> torch.Tensor:
        """Return a whole tensor."""
        return self._file(file).get_tensor(name).double()  # type: ignore[no-any-return]

    def rows(self, file: str, name: str, rows: list[int]) -> torch.Tensor:
        """Return some rows of a tensor, each flattened: ``[len(rows), …]``."""
        import torch

        part = self._file(file).get_slice(name)
        return torch.stack([part[row : row + 1].double().flatten() for row in rows])

    def _file(self, file: str) -> Any:
        from safetensors import safe_open

        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(file, "pt"))
        return self._open[file]


def _compare(
    reader: _Reader, evidence: Evidence, op: Merge, slot: TensorRef, rows: list[int]
) -> Issue | None:
    """Return an issue when some rows are further from the formula than rounding can carry them.

    With u the unit roundoff of the stored dtype and v = 2⁻²⁴ that of float32, a value x = w + s·Σ bᵢaᵢ of
    rank r is off by at most u·|x| + (1 + u)·(r + 4)·v·(|w| + |s|·Σ|bᵢaᵢ|), plus half a subnormal.
    """
    base = reader.rows(op.parts[0].file, op.parts[0].name, rows)
    exact, magnitude, rank = base.clone(), base.abs(), 0
    for delta in op.deltas:
        a = reader.tensor(delta.tensors["A"].file, delta.tensors["A"].name)
        b = reader.tensor(delta.tensors["B"].file, delta.tensors["B"].name)
        left, right = (a[:, rows].T, b.T) if delta.region.transposed else (b[rows], a)
        exact += delta.scale * (left @ right)
        magnitude += abs(delta.scale) * (left.abs() @ right.abs())
        rank += delta.rank
    stored = reader.rows(str(evidence.root / slot.file), slot.name, rows)
    roundoff = _ROUNDOFF[slot.dtype]
    carried = (rank + 4) * 2.0**-24 * magnitude
    bound = roundoff * exact.abs() + (1 + roundoff) * carried + _SMALLEST[slot.dtype] / 2
    wrong = ~((stored - exact).abs() <= bound)  # negated, so that NaN is wrong
    if not wrong.any():
        return None
    at_row, at_column = (int(index) for index in wrong.nonzero()[0])
    got, wanted = float(stored[at_row, at_column]), float(exact[at_row, at_column])
    where = f"row {rows[at_row]}, column {at_column}"
    return error("wrong-value", slot.name, f"{where} is {got:.9g}, expected {wanted:.9g}")

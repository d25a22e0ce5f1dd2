"""Are the merged values right? Recomputed in float64 by naive code that shares nothing with the merge.

Files are parsed anew, rows are whole, and the formula is written out.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lora_merge.core.plan import Merge
from lora_merge.core.report import error
from lora_merge.core.tensor import TORCH_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
    """Rows of stored tensors as float64, by a reader of its own: plain reads, no mapping of the files."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._open: dict[str, tuple[BinaryIO, dict[str, Any], int]] = {}

    def tensor(self, file: str, name: str) -> torch.Tensor:
        """Return a whole tensor of two axes."""
        return self.rows(file, name, range(self._row(file, name)["shape"][0]))

    def rows(self, file: str, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Return some rows of a tensor, each flattened: ``[len(rows), …]``."""
        import torch

        stream, _, data_start = self._file(file)
        row = self._row(file, name)
        begin, end = row["data_offsets"]
        n_bytes = (end - begin) // row["shape"][0]
        parts = []
        for index in rows:
            stream.seek(data_start + begin + index * n_bytes)
            parts.append(stream.read(n_bytes))
        values = torch.frombuffer(bytearray(b"".join(parts)), dtype=getattr(torch, TORCH_NAMES[row["dtype"]]))
        return values.double().view(len(rows), -1)

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

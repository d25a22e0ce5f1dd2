"""Which rows of merged tensors are recomputed, by level, size and what the merge saw while they passed."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lora_merge.checks.decoding import DECODERS
from lora_merge.checks.formulas import CHUNK_ROWS, FORMULAS
from lora_merge.core.plan import Merge
from lora_merge.core.view import View

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lora_merge.checks.evidence import Evidence
    from lora_merge.core.plan import Step  # noqa: TC004 - a field's type, never evaluated

WHOLE_ELEMENTS = 1 << 19
"""Elements that are recomputed at every level, smallest tensors first."""

UNSEEN_ELEMENTS = 1 << 24
"""Elements that are recomputed at every level, of tensors without a projection, smallest first."""

_CODED = 8
"""An element that is written in a code counts as so many: it takes about 0.1 µs (INT4, one core)."""

_CHUNK_ELEMENTS = 1 << 16
"""Elements that are recomputed together: a pass over so many numbers of eight bytes stays in a processor's cache."""

_MOST_PARTS = 64
"""The most parts of one tensor that are sampled."""

_SPREAD = 16
"""Rows of a tensor that are compared with what is recorded of the adapter's effect on all of them."""

_MOST_COMBINED = 6
"""The most adapters of a combination that is recomputed: a value may come from any subset of them, so there are 2ⁿ
candidates.
"""


@dataclass(slots=True)
class Choice:
    """The rows that are recomputed, and the tensors of which only some are."""

    rows: list[tuple[Step, list[int]]] = field(default_factory=list)
    """In chunks, in the order of the steps. After an error in a step, its other chunks are skipped."""

    unseen: list[str] = field(default_factory=list)
    """Tensors without a projection that are too large to recompute whole: only some rows are looked at."""

    @property
    def n_rows(self) -> int:
        """The number of rows."""
        return sum(len(rows) for _, rows in self.rows)


def chosen_rows(evidence: Evidence) -> Choice:
    """Return the rows of an output that are recomputed.

    Level ``full`` takes all of them. ``sample`` takes the first of a tensor, the last, one in between, those that
    projections suspect, and all of tensors as long as they are small.
    """
    suspects = {record.name: record.suspects for record in evidence.records}
    steps = [
        _by_line(step) for step in evidence.plan.steps if isinstance(step.op, Merge) and has_formula(step.op)
    ]
    whole: set[str] = set()
    if evidence.level == "full":
        whole = {step.name for step in steps}
    else:
        unseen = [step for step in steps if suspects.get(step.main.name) is None]
        # Tensors without a projection have no other check of all their rows, so of them more is recomputed.
        whole |= set(_smallest(unseen, UNSEEN_ELEMENTS)) | set(_smallest(steps, WHOLE_ELEMENTS))
    choice = Choice()
    for step in steps:
        op = step.op
        assert isinstance(op, Merge)
        ranges = suspects.get(step.main.name)
        rows = range(op.view.n_rows) if step.name in whole else some_rows(step.name, op, ranges or ())
        each = _rows_at_once(op)
        choice.rows += [(step, list(rows[at : at + each])) for at in range(0, len(rows), each)]
        # A note says that these rows were neither projected nor all recomputed.
        if ranges is None and step.name not in whole:
            choice.unseen.append(step.name)
    return choice


def _by_line(step: Step) -> Step:
    """Return a step with the rows that are recomputed: of a stack that is only decoded, rows of its matrices.

    Without deltas an entry of the stack is one row, and its values may be tens of millions.
    """
    op = step.op
    assert isinstance(op, Merge)
    if op.deltas or op.source.storage.is_dense:
        return step
    return replace(step, op=replace(op, view=View.of(op.source.shape, stacked=True)))


def _rows_at_once(op: Merge) -> int:
    """Return how many rows are recomputed together: as many as fit into a processor's cache, unless every part of a weight costs about
    as much as all of it.
    """
    is_across = any(DECODERS[storage.codec].is_across for storage in (op.source.storage, op.target))
    if is_across or any(delta.region.transposed for delta in op.deltas):
        return CHUNK_ROWS
    return min(max(_CHUNK_ELEMENTS // max(op.view.columns, 1), 1), CHUNK_ROWS)


def _smallest(steps: Iterable[Step], elements: int) -> Iterator[str]:
    """Yield the names of the smallest tensors, as many as fit into a number of elements together."""
    sized = []
    for step in steps:
        assert isinstance(step.op, Merge)
        each = 1 if step.op.target.is_dense else _CODED
        sized.append((each * step.op.view.n_rows * step.op.view.columns, step.name))
    for size, name in sorted(sized):
        elements -= size
        if elements < 0:
            return
        yield name


def has_formula(op: Merge) -> bool:
    """Return True when both storages of a step have a decoder, and each of its deltas a formula
    (`lora_merge.checks.formulas`).
    """
    if not {op.source.storage.codec, op.target.codec} <= DECODERS.keys():
        return False
    n_adapters = len({delta.adapter for delta in op.deltas})
    if op.combination is not None and (op.combination.method == "svd" or n_adapters > _MOST_COMBINED):
        return False
    return all(delta.algebra in FORMULAS for delta in op.deltas)


def some_rows(name: str, op: Merge, suspects: tuple[tuple[int, int], ...] = ()) -> list[int]:
    """Return the suspect rows and a few others, in order.

    The one in between is drawn from the name: always the same. Of stacked experts one row of each is taken, and where
    deltas have separate parts one row of each part; of up to `_MOST_PARTS`.
    """
    n_rows = op.view.n_rows
    if not n_rows:
        return []
    # Not `hash`, which differs from run to run: the same output is checked in the same rows.
    drawn = zlib.crc32(name.encode())
    rows = {0, drawn % n_rows, n_rows - 1}
    if op.deltas and (op.rounding is not None or not op.target.is_dense):
        apart = -(-n_rows // _SPREAD)
        rows.update(range(drawn % apart, n_rows, apart))
    # One row shows whether an expert has its own factors and its own place.
    for matrix in range(0, op.view.blocks, -(-op.view.blocks // _MOST_PARTS)) if op.view.blocks > 1 else ():
        rows.add(matrix * op.view.rows + drawn % max(op.view.rows, 1))
    parts = [delta.region.box for delta in op.deltas if delta.region.box]
    for box in parts[:: max(1, -(-len(parts) // _MOST_PARTS))]:
        matrix = box[0][0] if len(box) == 3 else 0
        top, bottom = box[-2] if len(box) > 1 else box[0]
        rows.add(matrix * op.view.rows + top + drawn % (bottom - top))
    for first, last in suspects:
        rows.update(range(first, min(last, n_rows)))
    return sorted(rows)

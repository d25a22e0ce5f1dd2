"""Are the merged values right? They are recomputed in float64 by simple code that shares nothing with the merge.

Files are parsed again, rows are whole, and the formula is written out.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from math import inf, isfinite
from operator import itemgetter, or_
from typing import TYPE_CHECKING

from lora_merge.checks.bounds import Wanted
from lora_merge.checks.choosing import chosen_rows, has_formula
from lora_merge.checks.coded_rows import CodedRows
from lora_merge.checks.decoding import DECODERS
from lora_merge.checks.effect import Effect
from lora_merge.checks.formulas import Site, changed, combined
from lora_merge.checks.overall_scales import OverallScales
from lora_merge.checks.plain_rows import PlainRows
from lora_merge.checks.reading import Reader
from lora_merge.checks.rounding import LARGEST
from lora_merge.checks.scales import Scales
from lora_merge.core.plan import Merge
from lora_merge.core.report import error, note
from lora_merge.core.weight import Weight
from lora_merge.storage.ahead import read_ahead
from lora_merge.words import listing, of_several

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    import torch

    from lora_merge.checks.evidence import Evidence
    from lora_merge.core.plan import Step
    from lora_merge.core.report import Issue
    from lora_merge.core.tensor import Survival

_MOST_NAMED = 4
"""The most ranges of rows that a message names."""

_SHAPE = "weight_shape"
"""The part of packed integers that states the weight's shape, for compressed-tensors."""


def recompute(evidence: Evidence) -> Iterator[Issue]:
    """Yield an issue for each merged tensor with a row that the float64 formula does not explain.

    `lora_merge.checks.choosing` says which rows are asked. What PEFT's own layers merged has no formula here; the check of
    their outputs covers it.
    """
    choice = chosen_rows(evidence)
    yield from _unproved(evidence, choice.unseen)
    survival = {record.name: record.survival for record in evidence.records}
    with contextlib.ExitStack() as stack:
        reader = Reader(stack, evidence.crew.n_threads)
        # In chunks, those of one step together.
        tasks = [(step, [rows for _, rows in chunks]) for step, chunks in groupby(choice.rows, itemgetter(0))]
        # A few rows of each tensor are small reads, far apart.
        ahead = (
            tasks if evidence.level == "full" else read_ahead(tasks, lambda task: _ranges(evidence, *task))
        )
        overall = OverallScales()

        def compared(task: tuple[Step, list[list[int]]]) -> Iterator[Issue | None]:
            step, chunked = task
            return _Compared(reader, evidence, step, overall).problems(chunked, survival.get(step.main.name))

        # Closed before the files are.
        with contextlib.closing(evidence.crew.each(compared, ahead)) as found:
            yield from filter(None, found)
        for step, _ in tasks:
            assert isinstance(step.op, Merge)
            if (wrong := overall.issue(step.op, _written(evidence, step), reader)) is not None:
                yield wrong


def _ranges(evidence: Evidence, step: Step, chunks: Sequence[list[int]]) -> Iterator[tuple[str, int, int]]:
    """Yield the file, the first byte and the size of each row of the output that is recomputed; of codes those of the main part, if it
    has rows.
    """
    op = step.op
    if not isinstance(op, Merge) or (not op.target.is_dense and DECODERS[op.target.codec].is_across):
        return
    for slot in step.slots if op.target.is_dense else step.slots[:1]:
        file, size = evidence.file_of(slot.file), slot.nbytes // op.view.n_rows
        for rows in chunks:
            # Of adjacent ones all are asked for together.
            if rows and rows[-1] - rows[0] == len(rows) - 1:
                yield file, slot.start + rows[0] * size, size * len(rows)
            else:
                yield from ((file, slot.start + row * size, size) for row in rows)


def _unproved(evidence: Evidence, unseen: list[str]) -> Iterator[Issue]:
    """Yield notes about tensors that are not recomputed, or only in some rows."""
    merges = [step for step in evidence.plan.steps if isinstance(step.op, Merge)]
    combined_ones = [
        step.name
        for step in merges
        if isinstance(step.op, Merge) and step.op.combination is not None and not has_formula(step.op)
    ]
    if combined_ones:
        why = "not recomputed: this way of combining adapters cannot be computed row by row"
        sentence = of_several(len(combined_ones), f"was {why}", f"were {why}")
        yield note("not-recomputed", combined_ones[0], sentence)
    unknown = [
        step.name
        for step in merges
        if isinstance(step.op, Merge)
        and not {step.op.source.storage.codec, step.op.target.codec} <= DECODERS.keys()
    ]
    if unknown:
        why = "not recomputed: there is no second decoder for this storage"
        sentence = of_several(len(unknown), f"was {why}", f"were {why}")
        yield note("not-recomputed", unknown[0], sentence)
    if unseen:
        why = "checked in some rows only: this kind of change has no check of every row"
        sentence = of_several(len(unseen), f"was {why}", f"were {why}")
        yield note("not-projected", unseen[0], sentence)


@dataclass(frozen=True, slots=True)
class _Wrong:
    """Rows of a chunk that are wrong, and the first value that is."""

    rows: tuple[int, ...]
    column: int
    got: float
    expected: float

    @classmethod
    def of(
        cls, rows: Sequence[int], stored: torch.Tensor, wanted: torch.Tensor, wrong: torch.Tensor
    ) -> _Wrong:
        """Return what is wrong.

        Args:
            rows: the numbers of all rows of the chunk.
            stored: what is in the output, float64 ``[rows, columns]``; wanted: the same; wrong: which, bool.
        """
        at_row, at_column = (int(index) for index in wrong.nonzero()[0])
        numbers = tuple(rows[n] for n in wrong.any(1).nonzero().flatten().tolist())
        return cls(numbers, at_column, float(stored[at_row, at_column]), float(wanted[at_row, at_column]))


_QUICK = (PlainRows, CodedRows)
"""What recomputes rows without torch, and says yes, or that it does not know."""


class _Compared:
    """The rows of one merged weight that are compared with the formula.

    Args:
        reader: of all files.
        evidence: the output.
        step: what made the weight.
        overall: gets to know how large the weight is.
    """

    def __init__(self, reader: Reader, evidence: Evidence, step: Step, overall: OverallScales) -> None:
        assert isinstance(step.op, Merge)
        self._reader, self._step, self._op, self._overall = reader, step, step.op, overall
        self._written = _written(evidence, step)
        self._scales = Scales.of(self._op, self._written, reader)
        self._quick = next(
            (kind(reader, self._op, self._written) for kind in _QUICK if kind.applies(self._op)), None
        )

    def problems(self, chunks: Sequence[list[int]], record: Survival | None) -> Iterator[Issue | None]:
        """Yield an issue when some rows are further from the formula than rounding explains, or when rounding did another
        thing to the adapter's effect than is recorded, or when a part says that the weight has another shape, or when a new
        scale is not that of its values; None after each chunk of rows.
        """
        yield self._other_shape()
        if (yield from self._settled(chunks, record)):
            return
        effect = None
        if self._op.deltas and self._op.combination is None and not _is_nearest(self._op):
            is_whole = sum(map(len, chunks)) == self._op.view.n_rows
            effect = Effect(self._reader, self._op, is_whole=is_whole)
        wrong = []
        for rows in chunks:
            if (found := self._compare(rows, effect)) is not None:
                wrong.append(found)
            # Here an interrupt may stop it.
            yield None
        if self._scales is not None:
            yield from self._scales.issues()
            self._overall.add(self._op, self._scales)
        if wrong:
            yield _told(self._step, wrong, sum(map(len, chunks)))
        elif effect is not None and effect.is_asked:
            yield effect.problem(self._step.name, record)

    def _settled(
        self, chunks: Sequence[list[int]], record: Survival | None
    ) -> Generator[Issue | None, None, bool]:
        """Return True where all is right for sure, by what needs no torch; yield None after each chunk of rows."""
        if self._quick is None:
            return False
        for rows in chunks:
            if not self._quick.are_explained(rows):
                return False
            yield None
        return self._quick.are_as_recorded(record)

    def _other_shape(self) -> Issue | None:
        """Return an issue if the part that states the weight's shape states another one. No code depends on it, so nothing else
        notices.
        """
        if _SHAPE not in self._step.writes:
            return None
        ref = self._written.parts[_SHAPE]
        found, expected = [int(size) for size in self._reader.whole(ref).tolist()], list(self._step.shape)
        if found == expected:
            return None
        return error("wrong-shape", ref.name, f"says that the weight has shape {found}, expected {expected}")

    def _compare(self, rows: list[int], effect: Effect | None) -> _Wrong | None:
        import torch

        op = self._op
        site = Site(self._reader, op, rows, op.between_dtype)
        stored = self._reader.written(self._written, rows, op.view.n_rows)
        start = site.start(rows)
        candidates = (
            combined(site, start) if op.combination is not None else [changed(site, op.deltas, start)]
        )
        if self._scales is not None:
            self._scales.add(rows, stored, candidates)
        wanted = [Wanted(op, stored, exact, off) for exact, off in candidates]
        is_moved = torch.ones(1, 1, dtype=torch.bool) if effect is None else effect.moved(rows)
        # A combination may have chosen any of the candidates: a value is wrong when it fits none.
        wrong = ~reduce(or_, (one.is_explained(is_moved) for one in wanted))
        is_wrong = bool(wrong.any())
        if op.on_stored_grid and is_wrong:
            # A group whose scale is 0 keeps its codes, and what they stand for.
            wrong &= (stored.parts[1] != 0) | (stored.values != start[0])
            is_wrong = bool(wrong.any())
        if is_wrong:
            return _Wrong.of(rows, stored.values, candidates[-1][0], wrong)
        if effect is not None and effect.is_asked:
            effect.add(rows, start[0], wanted[0])
        return None


def _is_nearest(op: Merge) -> bool:
    """Return True for a plain tensor whose values become the nearest numbers: nothing is recorded of its effect."""
    return op.target.is_dense and (op.rounding is None or op.rounding.method != "adapter")


def _written(evidence: Evidence, step: Step) -> Weight:
    """Return a weight as it is in the output."""
    assert isinstance(step.op, Merge)
    slots = dict(step.writes)
    if step.op.on_stored_grid:
        # Only the codes are the step's own. The other parts are copies, under the names that they have in the base.
        for role, part in step.op.source.parts.items():
            slots.setdefault(role, evidence.slots[part.name])
    return Weight(step.name, step.shape, step.op.target, evidence.stored_at(slots))


def _told(step: Step, wrong: Sequence[_Wrong], n_checked: int) -> Issue:
    """Return the issue for values that are wrong.

    Args:
        step: of the tensor.
        wrong: by chunk of rows, in order.
        n_checked: how many rows were compared.
    """
    assert isinstance(step.op, Merge)
    name, dtype = step.name, step.op.target.value_dtype
    first, rows = wrong[0], [row for one in wrong for row in one.rows]
    where = f"row {first.rows[0]}, column {first.column}"
    if not isfinite(first.expected):
        sentence = f"{where} is {first.got:.9g}: the base or the adapter has NaN or infinity there"
        return error("non-finite", name, sentence, "download the base and the adapter again")
    if abs(first.expected) > LARGEST.get(dtype, inf):
        sentence = f"{where} is to be {first.expected:.9g}, but the largest number of {dtype} is {LARGEST[dtype]:.3g}"
        return error("non-finite", name, sentence)
    sentence = f"{where} is {first.got:.9g}, expected {first.expected:.9g}"
    if len(rows) > 1:
        sentence += f"; {len(rows)} of {n_checked} checked rows are wrong: {_listed(rows)}"
    return error("wrong-value", name, sentence)


def _listed(rows: list[int]) -> str:
    """Return row numbers in words: ranges of adjacent rows, the first few."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][1] + 1 == row:
            runs[-1][1] = row
        else:
            runs.append([row, row])
    named = [str(first) if first == last else f"{first} to {last}" for first, last in runs]
    return listing(named, _MOST_NAMED)

"""Are the merged values right? They are recomputed in float64 by simple code that shares nothing with the merge.

Files are parsed again, rows are whole, and the formula is written out.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING

from lora_merge.checks.choosing import chosen_rows, has_formula
from lora_merge.checks.decoding import DECODERS
from lora_merge.checks.formulas import Site, changed, combined
from lora_merge.checks.reading import Reader
from lora_merge.checks.rounding import rounded
from lora_merge.core.plan import Merge
from lora_merge.core.report import error, note
from lora_merge.core.weight import Weight
from lora_merge.words import listing, of_several

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.checks.evidence import Evidence
    from lora_merge.core.plan import Step
    from lora_merge.core.report import Issue

_MOST_NAMED = 4
"""The most ranges of rows that a message names."""


def recompute(evidence: Evidence) -> Iterator[Issue]:
    """Yield an issue for each merged tensor with a row that the float64 formula does not explain.

    `lora_merge.checks.choosing` says which rows are asked. What PEFT's own layers merged has no formula here; the check of
    their outputs covers it.
    """
    choice = chosen_rows(evidence)
    yield from _unproved(evidence, choice.unseen)
    wrong: set[str] = set()
    with contextlib.ExitStack() as stack:
        reader = Reader(stack)
        for step, rows in choice.rows:
            name = step.name
            if name not in wrong and (problem := _compare(reader, evidence, step, rows)) is not None:
                wrong.add(name)
                yield problem


def _unproved(evidence: Evidence, unseen: list[str]) -> Iterator[Issue]:
    """Yield notes about tensors that are not recomputed, or only in some rows."""
    merges = [step for step in evidence.plan.steps if isinstance(step.op, Merge)]
    combined_ones = [
        step.name
        for step in merges
        if isinstance(step.op, Merge) and step.op.combination is not None and not has_formula(step.op)
    ]
    if combined_ones:
        why = "combined in a way that cannot be recomputed row by row"
        sentence = of_several(len(combined_ones), f"was {why}", f"were {why}")
        yield note("not-recomputed", combined_ones[0], sentence)
    unknown = [
        step.name
        for step in merges
        if isinstance(step.op, Merge)
        and not {step.op.source.storage.codec, step.op.target.codec} <= DECODERS.keys()
    ]
    if unknown:
        why = "stored in a way that is not decoded a second time"
        sentence = of_several(len(unknown), f"is {why}", f"are {why}")
        yield note("not-recomputed", unknown[0], sentence)
    if unseen:
        why = "of a kind whose rows are not checked one by one; some of them were recomputed"
        sentence = of_several(len(unseen), f"is {why}", f"are {why}")
        yield note("not-projected", unseen[0], sentence)


def _compare(reader: Reader, evidence: Evidence, step: Step, rows: list[int]) -> Issue | None:
    """Return an issue when some rows are further from the formula than rounding explains.

    What float32 computes for an exact x is between x - e and x + e, and rounding is monotonic. So the stored value is
    between those two bounds as the stored dtype rounds them. A codec adds half a gap of its grid.
    """
    import torch

    op = step.op
    assert isinstance(op, Merge)
    site = Site(reader, op, rows, op.target.value_dtype)
    parts = {role: replace(slot, file=str(evidence.root / slot.file)) for role, slot in step.writes.items()}
    written = Weight(step.name, step.shape, op.target, parts)
    stored, gap = reader.written(written, rows, op.view.n_rows)
    candidates = combined(site) if op.combination is not None else [changed(site, op.deltas)]
    wrong = stored.new_ones(stored.shape, dtype=torch.bool)
    for exact, off in candidates:
        if gap is None:
            low, high = rounded(exact - off, op.target.dtype), rounded(exact + off, op.target.dtype)
        else:
            low, high = exact - off - gap, exact + off + gap
        # A combination may have chosen any of the candidates: a value is wrong when it fits none.
        wrong &= ~((low <= stored) & (stored <= high))  # negated, so that NaN is wrong
    if not wrong.any():
        return None
    at_row, at_column = (int(index) for index in wrong.nonzero()[0])
    got, wanted = float(stored[at_row, at_column]), float(candidates[-1][0][at_row, at_column])
    where = f"row {rows[at_row]}, column {at_column}"
    if not isfinite(wanted):
        sentence = f"{where} is {got:.9g}: so it is in the base, or follows from the adapter"
        return error("non-finite", step.name, sentence, "the inputs hold NaN or infinity: fetch them again")
    sentence = f"{where} is {got:.9g}, expected {wanted:.9g}"
    others = [rows[n] for n in wrong.any(1).nonzero().flatten().tolist()]
    if len(others) > 1:
        sentence += f"; {len(others)} of the {len(rows)} rows looked at with it are wrong: {_listed(others)}"
    return error("wrong-value", step.name, sentence)


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

"""Steps as whole files: every step once, in the order of the bytes, and how much waits for its place."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora_merge import api
from lora_merge.core.plan import Copy, Merge
from lora_merge.merging.by_file import file_pieces, held_bytes


@pytest.fixture(scope="module")
def plan(pico, pico_adapter):
    base = pico("llama", "bfloat16", "60KB")
    return api.plan(adapter=str(pico_adapter(base)), base=str(base))


def steps_of(piece):
    return [step for one in piece.pieces for _, steps in one.wanted for step in steps]


def test_each_file_is_one_piece_with_its_steps_in_the_order_of_their_bytes(plan):
    pieces = file_pieces(plan)
    assert sorted(file.name for piece in pieces for file in piece.files) == [file.name for file in plan.files]
    assert [piece.nbytes for piece in pieces] == sorted((piece.nbytes for piece in pieces), reverse=True)
    for piece in pieces:
        (file,) = piece.files
        assert [slot.name for step in steps_of(piece) for slot in step.slots] == [
            slot.name for slot in file.slots
        ]
        assert held_bytes(piece) == 0
    assert sum(map(len, map(steps_of, pieces))) == len(plan.steps)


def test_files_that_are_there_are_left_out(plan):
    names = [file.name for file in plan.files]
    assert [file.name for piece in file_pieces(plan, names[1:]) for file in piece.files] == names[:1]
    assert file_pieces(plan, names) == []


def test_files_that_one_step_fills_are_made_together(plan):
    first, *middle, last = plan.files
    step = next(step for step in plan.steps if step.main.file == first.name and isinstance(step.op, Merge))
    far = last.slots[-1]
    joined = replace(step, writes={**step.writes, "scale": far})
    others = tuple(one for one in plan.steps if one.main != far and one is not step)
    pieces = file_pieces(replace(plan, steps=(joined, *others)))
    assert {tuple(file.name for file in piece.files) for piece in pieces} == {
        (first.name, last.name),
        *((file.name,) for file in middle),
    }
    again = file_pieces(replace(plan, steps=(joined, *others)), [file.name for file in (first, *middle)])
    assert [file.name for piece in again for file in piece.files] == [first.name, last.name]


@pytest.mark.parametrize("main", ["weight first", "scale first"])
def test_what_is_behind_other_tensors_waits_whole(plan, main):
    file = plan.files[0]
    merge = next(step.op for step in plan.steps if isinstance(step.op, Merge))
    one, two, three, *rest = file.slots
    weight, scale = (one, three) if main == "weight first" else (three, one)
    copies = [
        replace(plan.steps[0], name=slot.name, writes={"w": slot}, op=Copy(slot)) for slot in (two, *rest)
    ]
    merged = replace(plan.steps[0], writes={"w": weight, "s": scale}, op=merge)
    (piece,) = file_pieces(replace(plan, files=(file,), steps=(merged, *copies)))
    assert held_bytes(piece) == three.nbytes

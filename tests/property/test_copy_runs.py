"""Neighbouring copies are joined: nothing is lost, nothing moves, and a run is one range on either side."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lora_merge.core.checkpoint import ConfigPatch
from lora_merge.core.plan import Copy, MergePlan
from lora_merge.core.shards import place
from lora_merge.core.tensor import TensorRef
from lora_merge.storage.copy_runs import copy_runs, whole_copies
from tests.steps import step_at

copies = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.sampled_from("xy"), st.integers(0, 3), st.integers(0, 20)),
    max_size=30,
)  # fmt: skip
"""For each copy: its source, the gap before it there, its output file, the gap before it there, its size."""


def steps_of(drawn):
    """Return copies whose places on both sides follow each other, with gaps."""
    at, steps = dict.fromkeys("abxy", 8), []
    for n, (source, source_gap, target, target_gap, nbytes) in enumerate(drawn):
        at[source] += source_gap // 2  # two of four gaps are none
        at[target] += target_gap // 2
        ref = TensorRef(f"t{n}", "U8", (nbytes,), source, at[source], nbytes)
        slot = TensorRef(f"t{n}", "U8", (nbytes,), target, at[target], nbytes)
        steps.append(step_at(slot, Copy(ref)))
        at[source] += nbytes
        at[target] += nbytes
    return steps


@given(copies, st.integers(1, 60))
def test_copy_runs_have_every_copy_once_in_order_and_are_one_range_on_either_side(drawn, most_bytes):
    steps = steps_of(drawn)
    found = copy_runs(steps, most_bytes)
    assert [step for run in found for step in run.steps] == steps
    for run in found:
        for refs in (run.sources, run.slots):
            assert len({ref.file for ref in refs}) == 1
            assert all(before.end == after.start for before, after in pairwise(refs))
            assert refs[-1].end - refs[0].start == run.nbytes
        assert run.nbytes <= most_bytes or len(run.steps) == 1 or run.nbytes == run.steps[0].nbytes


@given(copies)
def test_neighbours_are_joined_wherever_they_fit(drawn):
    found = copy_runs(steps_of(drawn), most_bytes=10**6)
    for before, after in pairwise(found):
        source, slot = before.sources[-1], before.slots[-1]
        assert (source.file, source.end, slot.file, slot.end) != (
            after.sources[0].file, after.sources[0].start, after.slots[0].file, after.slots[0].start
        )  # fmt: skip


def test_a_large_copy_is_a_run_by_itself():
    steps = steps_of([("a", 0, "x", 0, 5), ("a", 0, "x", 0, 100), ("a", 0, "x", 0, 5), ("a", 0, "x", 0, 5)])
    assert [run.nbytes for run in copy_runs(steps, 12)] == [5, 100, 10]


def plan_of(refs, changed=(), moved=0):
    """Return a plan that copies one file, but for some tensors."""
    sources = place("model.safetensors", refs, {})
    steps = []
    for slot in sources.slots:
        source = TensorRef(
            slot.name, slot.dtype, slot.shape, "/base/model.safetensors", slot.start + moved, slot.nbytes
        )
        other = TensorRef(slot.name, slot.dtype, slot.shape, "/adapter", 8, slot.nbytes)
        steps.append(step_at(slot, Copy(other if slot.name in changed else source)))
    return MergePlan("/base", (), (), (sources,), tuple(steps), (), ConfigPatch(), "", ())


REFS = [TensorRef(name, "F32", (3, 2), "", 0, 24) for name in ("one", "two", "three")]


def test_a_file_of_nothing_but_copies_that_lie_as_they_did_may_be_the_bases_own():
    assert whole_copies(plan_of(REFS)) == {"model.safetensors": "/base/model.safetensors"}


def test_a_file_with_a_tensor_from_elsewhere_or_with_another_header_may_not():
    assert whole_copies(plan_of(REFS, changed=["two"])) == {}
    assert whole_copies(plan_of(REFS, moved=8)) == {}

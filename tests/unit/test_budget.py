"""Workers and tiles: as many and as large as memory allows, and the plan's estimate of the memory is what decides."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from lora_merge.core.adapter import Delta
from lora_merge.core.checkpoint import ConfigPatch
from lora_merge.core.plan import Combination, Copy, MergePlan
from lora_merge.core.tensor import TensorRef
from lora_merge.core.view import TILE_ELEMENTS, View
from lora_merge.deltas import LowRankFacts
from lora_merge.merging.budget import (
    CUDA_TILE_ELEMENTS,
    FIRST_WORKERS,
    MOST_WORKERS,
    Budget,
    allot,
    peak_together,
)
from lora_merge.merging.estimate import occupied_workers
from lora_merge.merging.peak import PLAIN_RUNTIME_BYTES, RUNTIME_BYTES, peak_bytes, runtime_bytes
from lora_merge.native.library import hidden, library
from tests.steps import dense_merge, step_at

MB = 1 << 20


def step_of(rows, columns, reach="rows"):
    """Return a merge of one matrix."""
    ref = TensorRef("w", "BF16", (rows, columns), "file", 0, 2 * rows * columns)
    factors = {"A": TensorRef("a", "F32", (4, columns), "file", 0, 16 * columns)}
    delta = Delta("w", LowRankFacts(), factors).placed("w")
    return step_at(ref, dense_merge(ref, (delta,), View.of(ref.shape), reach))


def plan_of(*steps):
    return MergePlan("base", (), (), (), steps, (), ConfigPatch(), "", ())


PLAN = plan_of(*[step_of(4096, 4096)] * 3)


def test_with_memory_for_all_there_is_a_worker_for_every_core_and_tiles_of_the_best_size():
    budget = allot(PLAN, None, 4, None)
    assert (budget.n_workers, budget.tile_elements) == (4, TILE_ELEMENTS)
    assert budget.peak_bytes == peak_bytes(PLAN, 4)
    assert allot(PLAN, None, 4, 1 << 40) == budget


def test_threads_on_a_cpu_may_have_every_core_and_begin_with_a_few():
    found = allot(PLAN, None, 64, None)
    assert (found.n_workers, found.n_first) == (64, max(FIRST_WORKERS, occupied_workers(PLAN)))
    # What is asked for, and what is not measured, begins with all of them.
    asked = Budget(
        20, TILE_ELEMENTS, peak_bytes(PLAN, 20), 0, is_asked=True, runtime_bytes=runtime_bytes(PLAN)
    )
    assert allot(PLAN, 20, 2, None) == asked
    for options in ({"in_processes": True}, {"on_gpu": True}, {"whole_files": [1] * 50}):
        others = allot(PLAN, None, 64, None, **options)
        assert (others.n_workers, others.n_first) == (MOST_WORKERS, 0)
    assert allot(PLAN, None, FIRST_WORKERS, None).n_first == 0


def test_arithmetic_that_occupies_more_cores_than_that_has_them_from_the_start():
    heavy = plan_of(
        *(
            replace(step, op=replace(step.op, combination=Combination("ties", 0.5, 0, 1, step.name)))
            for step in PLAN.steps
        )
    )
    assert FIRST_WORKERS < 2 * occupied_workers(PLAN) < occupied_workers(heavy)
    found = allot(heavy, None, 1000, None)
    assert (found.n_workers, found.n_first) == (1000, occupied_workers(heavy))
    assert allot(heavy, None, 6, None).n_first == 0


def test_tiles_do_not_shrink_for_more_workers_than_eight():
    eight = allot(PLAN, None, MOST_WORKERS, None)
    found = allot(plan_of(*[step_of(4096, 4096)] * 64), None, 64, eight.peak_bytes * 2)
    assert found.n_workers > MOST_WORKERS
    assert found.tile_elements == TILE_ELEMENTS
    assert found.peak_bytes <= eight.peak_bytes * 2
    less = allot(plan_of(*[step_of(4096, 4096)] * 64), None, 64, RUNTIME_BYTES + (40 << 20))
    assert less.n_workers <= MOST_WORKERS


def test_a_gpu_has_larger_tiles():
    assert allot(PLAN, 2, 2, None, on_gpu=True).tile_elements == CUDA_TILE_ELEMENTS


def test_workers_in_processes_have_torch_each_and_fewer_of_them_fit():
    in_threads, in_processes = allot(PLAN, 3, 3, None), allot(PLAN, 3, 3, None, in_processes=True)
    assert in_processes.peak_bytes == in_threads.peak_bytes + 3 * RUNTIME_BYTES
    assert allot(PLAN, 3, 3, in_threads.peak_bytes, in_processes=True).n_workers < 3


def test_tiles_shrink_before_a_worker_is_given_up():
    full = allot(PLAN, 2, 2, None)
    less = allot(PLAN, 2, 2, full.peak_bytes - 1)
    assert (less.n_workers, less.tile_elements) == (2, TILE_ELEMENTS // 2)
    assert less.peak_bytes < full.peak_bytes


@pytest.mark.parametrize("limit_mb", range(262, 320, 3))
def test_what_is_allotted_fits_and_one_more_of_anything_would_not(limit_mb):
    limit = limit_mb * MB
    budget = allot(PLAN, 3, 3, limit)
    if budget.peak_bytes > limit:
        assert (budget.n_workers, budget.tile_elements) == (1, TILE_ELEMENTS // 8)
        return
    if budget.tile_elements < TILE_ELEMENTS:
        assert peak_bytes(PLAN, budget.n_workers, 2 * budget.tile_elements) > limit
    if budget.n_workers < 3:
        assert peak_bytes(PLAN, budget.n_workers + 1, TILE_ELEMENTS // 8) > limit


def test_whole_tensors_in_memory_cost_workers_since_tiles_do_not_help():
    plan = plan_of(*[step_of(4096, 4096, "tensor")] * 3)
    one = peak_bytes(plan, 1)
    assert allot(plan, 3, 3, one).n_workers == 1
    assert allot(plan, 3, 3, one - 1).peak_bytes > one - 1
    assert one - RUNTIME_BYTES > 4096 * 4096 * 12


def test_the_peak_is_that_of_the_heaviest_steps_together_not_of_the_heaviest_as_often_as_there_are_workers():
    small, large = step_of(64, 64), step_of(4096, 4096, "tensor")
    both, alone = peak_bytes(plan_of(small, large), 2), peak_bytes(plan_of(large), 1)
    assert alone < both < alone + 4 * MB


def test_a_plan_of_copies_needs_little():
    ref = TensorRef("w", "BF16", (4096, 4096), "file", 0, 2 << 24)
    assert peak_bytes(plan_of(step_at(ref, Copy(ref))), 2) < RUNTIME_BYTES + 8 * MB


@pytest.mark.skipif(library() is None, reason="the compiled loops are not built here")
def test_torch_counts_where_it_is_needed_or_loaded(monkeypatch):
    ref = TensorRef("w", "BF16", (4096, 4096), "file", 0, 1 << 25)
    sides = {"A": (4, 4096), "B": (4096, 4)}
    factors = {role: TensorRef(role, "F32", shape, "file", 0, 1 << 16) for role, shape in sides.items()}
    delta = Delta("w", LowRankFacts(), factors).placed("w")
    plan = plan_of(step_at(ref, dense_merge(ref, (delta,), View.of(ref.shape))))
    assert runtime_bytes(plan) == RUNTIME_BYTES
    monkeypatch.delitem(sys.modules, "torch")
    alone = peak_bytes(plan, 2)
    assert runtime_bytes(plan) == PLAIN_RUNTIME_BYTES
    assert allot(plan, 2, 2, None).peak_bytes == alone
    for needed in (
        peak_bytes(plan, 2, runtime=runtime_bytes(plan, on_gpu=True)),
        peak_bytes(plan_of(*plan.steps, *PLAN.steps), 1),
    ):
        assert needed > alone + (RUNTIME_BYTES - PLAIN_RUNTIME_BYTES) / 2
    with hidden():
        assert peak_bytes(plan, 2) == alone + RUNTIME_BYTES - PLAIN_RUNTIME_BYTES


def test_merges_in_one_pass_take_what_each_takes_and_what_the_process_takes_once():
    one, other = (Budget(2, TILE_ELEMENTS, RUNTIME_BYTES + n * MB) for n in (30, 50))

    assert peak_together([one]) == one.peak_bytes
    assert peak_together([one, other]) == RUNTIME_BYTES + 80 * MB
    plain = Budget(2, TILE_ELEMENTS, PLAIN_RUNTIME_BYTES + 20 * MB, runtime_bytes=PLAIN_RUNTIME_BYTES)
    assert peak_together([plain, one]) == RUNTIME_BYTES + 50 * MB

"""What every executor keeps, for each member of `EXECUTORS`."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
import torch

from lora_merge.core.plan import Copy
from lora_merge.core.tensor import TensorRecord, TensorRef
from lora_merge.executors import EXECUTORS, pick
from lora_merge.executors.threads import run_threads
from tests.steps import step_at

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
each = pytest.mark.parametrize(
    "executor",
    [
        pytest.param(run, id=name, marks=needs_cuda if name == "cuda" else ())
        for name, run in EXECUTORS.items()
    ],
)
PAUSE_SECONDS = 0.02


def steps_of(sizes):
    """Return one step for each size in bytes."""
    refs = [TensorRef(f"t{n}", "U8", (nbytes,), "file", 0, nbytes) for n, nbytes in enumerate(sizes)]
    return [step_at(ref, Copy(ref)) for ref in refs]


class Work:
    """Does steps: notes which began and which ended, and fails at those it is told to."""

    def __init__(self, *failing, pause_seconds=0.0):
        self.began, self.ended = [], []
        self._failing, self._pause_seconds = failing, pause_seconds

    def __call__(self, step):
        (slot,) = step.slots
        self.began.append(slot.name)
        if slot.name in self._failing:
            raise ArithmeticError(slot.name)
        threading.Event().wait(self._pause_seconds)
        self.ended.append(slot.name)
        return TensorRecord(slot.name, slot.file, slot.nbytes, "digest", finite=True)


@each
@pytest.mark.parametrize("n_workers", [1, 2, 7])
@pytest.mark.parametrize("sizes", [[], [3], [1, 9, 0, 4, 4, 7]], ids=len)
def test_every_step_is_done_once_and_leaves_one_record(executor, n_workers, sizes):
    steps, work = steps_of(sizes), Work()
    records = list(executor(work, steps, n_workers))
    names = sorted(step.name for step in steps)
    assert sorted(record.name for record in records) == names
    assert sorted(work.began) == names
    assert sum(record.nbytes for record in records) == sum(sizes)


@each
@pytest.mark.parametrize("n_workers", [1, 3])
def test_the_first_error_reaches_the_caller_and_later_steps_are_not_begun(executor, n_workers):
    steps = steps_of([200 - n for n in range(100)])
    work = Work("t1", pause_seconds=PAUSE_SECONDS)
    with pytest.raises(ArithmeticError, match="t1"):
        list(executor(work, steps, n_workers))
    assert "t1" in work.began
    assert len(work.began) < len(steps)
    done_by_then = len(work.ended)
    threading.Event().wait(3 * PAUSE_SECONDS)
    assert len(work.ended) == done_by_then  # nothing runs on behind the caller's back


@each
@pytest.mark.parametrize("n_workers", [1, 3])
def test_when_the_caller_stops_listening_steps_that_have_not_begun_never_do(executor, n_workers):
    steps, work = steps_of([1] * 100), Work(pause_seconds=PAUSE_SECONDS)
    with closing(iter(executor(work, steps, n_workers))) as records:
        assert next(records).nbytes == 1
    assert len(work.began) < len(steps)
    assert sorted(work.began) == sorted(work.ended)
    begun_by_then = len(work.began)
    threading.Event().wait(3 * PAUSE_SECONDS)
    assert len(work.began) == begun_by_then


@each
def test_an_executor_that_nobody_listens_to_does_nothing(executor):
    work = Work()
    executor(work, steps_of([1, 2]), 2)
    assert work.began == []


@pytest.mark.parametrize("n_workers", [1, 2, 8])
def test_the_executor_that_is_picked_is_in_the_table(n_workers):
    assert pick(n_workers) in EXECUTORS.values()


def test_a_gpu_has_an_executor_of_its_own_which_knows_the_device():
    picked = pick(4, "cuda:1")
    assert picked.func is EXECUTORS["cuda"]
    assert picked.keywords == {"device": "cuda:1"}


def test_every_thread_is_told_to_begin_before_its_first_step():
    begun, steps = set(), steps_of([1] * 20)

    def do(step):
        assert threading.get_ident() in begun
        return step.name

    names = list(run_threads(do, steps, 3, begin=lambda: begun.add(threading.get_ident())))
    assert len(names) == 20
    assert threading.get_ident() not in begun

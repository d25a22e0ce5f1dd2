"""What every executor keeps, for each member of `EXECUTORS`."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
import threading
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lora_merge.core.work import Plain
from lora_merge.errors import (
    BugError,
    ChangedError,
    CheckpointError,
    OutOfMemoryError,
    RequestError,
    WriteError,
)
from lora_merge.executors import EXECUTORS, pick
from lora_merge.executors.pace import Pace
from lora_merge.executors.paced import run_paced
from lora_merge.executors.threads import run_threads
from tests.crossing import diagonal


def paced(spec, pieces, n_workers):
    """Run threads of which one begins and the others are tried."""
    return run_paced(spec, pieces, n_workers, Pace(1, n_workers))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
each = pytest.mark.parametrize(
    "executor",
    [
        pytest.param(run, id=name, marks=needs_cuda if name == "cuda" else ())
        for name, run in {**EXECUTORS, "paced": paced}.items()
    ],
)
PAUSE_SECONDS = 0.02


@dataclass(frozen=True)
class Task:
    """A piece of work."""

    name: str
    nbytes: int


def tasks_of(sizes):
    return [Task(f"t{n}", nbytes) for n, nbytes in enumerate(sizes)]


@dataclass(frozen=True)
class Noted:
    """Workers that leave a file for each piece that they begin and for each that they end; they fail at some."""

    place: Path
    failing: tuple[str, ...] = ()
    pause_seconds: float = 0.0

    @contextlib.contextmanager
    def make(self, n):
        yield [self._worker(number) for number in range(n)]

    def _worker(self, number):
        owners = set()

        def work(task):
            owners.add((os.getpid(), threading.get_ident()))
            assert len(owners) == 1, "a worker belongs to one thread"
            (self.place / f"{task.name}.began").touch()
            if task.name in self.failing:
                raise WriteError(task.name, hint="of a worker")
            threading.Event().wait(self.pause_seconds)
            (self.place / f"{task.name}.ended").touch()
            return task.name, task.nbytes, (os.getpid(), number)

        return work

    @property
    def began(self):
        return sorted(path.stem for path in self.place.glob("*.began"))

    @property
    def ended(self):
        return sorted(path.stem for path in self.place.glob("*.ended"))


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Let other processes import this module."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])


@each
@pytest.mark.parametrize(
    ("sizes", "n_workers"), diagonal({"0": [], "1": [3], "6": [1, 9, 0, 4, 4, 7]}, [1, 2])
)
def test_every_piece_is_done_once_and_has_one_result(executor, n_workers, sizes, tmp_path):
    tasks, spec = tasks_of(sizes), Noted(tmp_path)
    results = list(executor(spec, tasks, n_workers))
    assert sorted(name for name, *_ in results) == spec.ended == sorted(task.name for task in tasks)
    assert sum(nbytes for _, nbytes, _ in results) == sum(sizes)
    assert len({worker for *_, worker in results}) <= n_workers


@each
@pytest.mark.parametrize("n_workers", [1, 3])
def test_the_first_error_reaches_the_caller_and_later_pieces_are_not_begun(executor, n_workers, tmp_path):
    # So many that they outlast a process that starts late on a busy machine.
    tasks, spec = tasks_of([1] * 2000), Noted(tmp_path, ("t1",), PAUSE_SECONDS)
    with pytest.raises(WriteError, match="t1") as caught:
        list(executor(spec, tasks, n_workers))
    assert caught.value.hint == "of a worker"
    assert "t1" in spec.began
    assert len(spec.began) < len(tasks)
    done_by_then = len(spec.ended)
    threading.Event().wait(3 * PAUSE_SECONDS)
    assert len(spec.ended) == done_by_then  # nothing runs on behind the caller's back


@each
@pytest.mark.parametrize("n_workers", [1, 3])
def test_when_the_caller_stops_listening_pieces_that_have_not_begun_never_do(executor, n_workers, tmp_path):
    tasks, spec = tasks_of([1] * 100), Noted(tmp_path, (), PAUSE_SECONDS)
    with closing(executor(spec, tasks, n_workers)) as results:
        assert next(results)[1] == 1
    assert len(spec.began) < len(tasks)
    assert spec.began == spec.ended
    begun_by_then = spec.began
    threading.Event().wait(3 * PAUSE_SECONDS)
    assert spec.began == begun_by_then


@each
def test_an_executor_that_nobody_listens_to_does_nothing(executor, tmp_path):
    spec = Noted(tmp_path)
    executor(spec, tasks_of([1, 2]), 2)
    assert spec.began == []


@each
def test_pieces_are_begun_in_the_order_in_which_they_come(executor, tmp_path):
    tasks = tasks_of([1, 9, 2, 8])
    assert [name for name, *_ in executor(Noted(tmp_path), tasks, 1)] == ["t0", "t1", "t2", "t3"]


@pytest.mark.parametrize("n_workers", [1, 2, 8])
@pytest.mark.parametrize("name", ["auto", *(name for name in EXECUTORS if name != "cuda")])
def test_the_executor_that_is_picked_is_in_the_table_and_auto_starts_no_processes(n_workers, name):
    picked = pick(n_workers, name=name)
    if name == "auto":
        assert picked in {EXECUTORS["serial"], EXECUTORS["threads"]}
    else:
        assert picked is EXECUTORS[name]


def test_a_gpu_has_an_executor_of_its_own_which_knows_the_device():
    picked = pick(4, "cuda:1")
    assert picked.func is EXECUTORS["cuda"]
    assert picked.keywords == {"device": "cuda:1"}


def test_every_thread_is_told_to_begin_before_its_first_piece():
    begun = set()

    def do(task):
        assert threading.get_ident() in begun
        return task.name

    begin = lambda: begun.add(threading.get_ident())  # noqa: E731 - a stand-in
    names = list(run_threads(Plain(do), tasks_of([1] * 20), 3, begin=begin))
    assert len(names) == 20
    assert threading.get_ident() not in begun


def die(task):
    if task.name == "t1":
        os.kill(os.getpid(), signal.SIGKILL)
    return task.name


def divide(task):
    return 1 / task.nbytes


def test_a_process_that_is_killed_ends_the_run_with_a_fault_that_can_be_resumed():
    with pytest.raises(WriteError, match=r"ended unexpectedly \(SIGKILL\)") as caught:
        list(EXECUTORS["processes"](Plain(die), tasks_of([1] * 8), 2))
    assert "--workers" in caught.value.hint


def test_a_bug_in_another_process_comes_back_as_one():
    with pytest.raises(BugError, match="ZeroDivisionError") as caught:
        list(EXECUTORS["processes"](Plain(divide), tasks_of([0]), 1))
    assert "in divide" in caught.value.traceback


@pytest.mark.parametrize(
    "error",
    [
        WriteError("out: is full", "a line", hint="free some"),
        CheckpointError("file", "tensor", "is odd", "even", hint="mend it"),
        ChangedError("file", "", "changed"),
        RequestError("", 3, "dtype", "is none", hint="leave it out"),
        OutOfMemoryError("merging w", "the GPU"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_travels_with_its_sentence_its_data_and_its_notes(error):
    error.add_note("what is whole stays")
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is type(error)
    assert (str(there), there.hint, there.__notes__) == (str(error), error.hint, error.__notes__)
    assert vars(there) == vars(error)


def told_signals(task):
    return tuple(signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))


def test_worker_processes_leave_signals_to_their_parent():
    (found,) = EXECUTORS["processes"](Plain(told_signals), tasks_of([1]), 1)
    assert found == (signal.SIG_IGN,) * 3


def test_workers_of_one_process_are_made_together(tmp_path):
    made = []

    @dataclass(frozen=True)
    class Counted:
        @contextlib.contextmanager
        def make(self, n):
            made.append(n)
            yield [lambda task, number=number: number for number in range(n)]
            made.append("over")

    numbers = set(run_threads(Counted(), tasks_of(itertools.repeat(1, 20)), 3))
    assert made == [3, "over"]
    assert numbers <= {0, 1, 2}

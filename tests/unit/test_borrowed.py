"""Settings of the whole process are as they were, however the merges of several threads overlap."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from functools import partial

import pytest

from lora_merge.executors.cuda import _EXACT_PRODUCTS
from lora_merge.merging.worker import short_switch_interval
from lora_merge.runtime.borrowed import Borrowed
from lora_merge.runtime.torch_threads import one_torch_thread


class Actor:
    """A thread that enters and leaves contexts when it is told to."""

    def __init__(self):
        self._told, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._call, self._answer = None, None
        threading.Thread(target=self._act, daemon=True).start()

    def _act(self):
        while True:
            self._told.acquire()
            self._answer = self._call()
            self._done.release()

    def __call__(self, call):
        self._call = call
        self._told.release()
        assert self._done.acquire(timeout=30)
        return self._answer


ORDERS = [
    order
    for order in set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    if order.index(0) < order.index(1) < order.index(2)  # the three are alike
]


def overlap(context, order, looks=lambda: None):
    """Have three threads enter a context, the first time one is named, and leave it, the second; return what each sees then."""
    actors, inside = [Actor() for _ in range(3)], {}
    for n in order:
        if n in inside:
            actors[n](partial(inside.pop(n).__exit__, None, None, None))
        else:
            inside[n] = context()
            actors[n](inside[n].__enter__)
    return [actor(looks) for actor in actors]


@pytest.mark.parametrize("order", ORDERS)
def test_the_switch_interval_is_as_it_was_in_every_order_of_three_threads(order):
    before = sys.getswitchinterval()

    overlap(short_switch_interval, order)

    assert sys.getswitchinterval() == before


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_torch_has_its_threads_again_in_every_order_of_three_threads(order, n_threads):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        seen = overlap(one_torch_thread, order, torch.get_num_threads)
        assert [*seen, torch.get_num_threads(), Actor()(torch.get_num_threads)] == [n_threads] * 5
    finally:
        torch.set_num_threads(before)


def test_torch_has_one_thread_as_long_as_one_merge_of_several_goes_on(three_threads):
    import torch

    first, second = Actor(), Actor()
    one, other = one_torch_thread(), one_torch_thread()
    first(one.__enter__)
    second(other.__enter__)
    first(lambda: one.__exit__(None, None, None))

    assert second(torch.get_num_threads) == Actor()(torch.get_num_threads) == 1

    second(lambda: other.__exit__(None, None, None))


def test_a_merge_inside_another_leaves_torch_one_thread(three_threads):
    import torch

    with one_torch_thread():
        with one_torch_thread():
            pass
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == three_threads


def test_a_thread_keeps_the_number_of_its_own(three_threads):
    import torch

    before, actor = torch.get_num_threads(), Actor()
    actor(torch.get_num_threads)  # torch forgets what is set in a thread that has not asked yet
    actor(lambda: torch.set_num_threads(5))
    torch.set_num_threads(before)
    own = one_torch_thread()
    with one_torch_thread():
        actor(own.__enter__)
    actor(lambda: own.__exit__(None, None, None))

    assert actor(torch.get_num_threads) == 5
    assert Actor()(torch.get_num_threads) == torch.get_num_threads() == before


@pytest.mark.parametrize("order", ORDERS)
def test_products_on_a_gpu_are_as_they_were(order):
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        overlap(_EXACT_PRODUCTS.changed, order)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_a_setting_is_put_back_after_an_error():
    value = ["before"]
    setting = Borrowed(lambda: value[0], lambda new: value.__setitem__(0, new), "changed")

    with contextlib.suppress(KeyError), setting.changed():
        assert value == ["changed"]
        raise KeyError

    assert value == ["before"]

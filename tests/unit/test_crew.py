"""A crew finds what one thread finds, in the same order; and it stops when it is told to."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing
from contextvars import ContextVar

import pytest

from lora_merge.executors.crew import ALONE, Crew

SOON_SECONDS = 5
VALUE = ContextVar("value", default="none")


@pytest.fixture(params=[1, 2, 5])
def crew(request):
    with Crew(request.param) as crew:
        yield crew


def uneven(n):
    """Yield n and its negative; the first items take the longest."""
    time.sleep(0.02 if n % 7 == 0 else 0)
    yield n
    yield -n


def test_what_is_found_comes_in_the_order_of_the_items(crew):
    assert list(crew.each(uneven, range(100))) == [found for n in range(100) for found in (n, -n)]


def test_of_several_errors_the_first_in_order_comes_out_after_what_was_found_before(crew):
    def look(n):
        if n in {5, 6}:
            time.sleep(0.05 if n == 5 else 0)  # the later one fails first
            raise ValueError(f"item {n}")
        yield n

    found = []
    with pytest.raises(ValueError, match="item 5"):
        found.extend(crew.each(look, range(20)))
    # What `extend` had taken is lost with its list where it took it at once.
    assert found in ([], [0, 1, 2, 3, 4])


def test_an_error_of_the_items_comes_out(crew):
    def items():
        yield 1
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        list(crew.each(uneven, items()))


def test_threads_look_at_the_same_time():
    met = threading.Barrier(3)

    def look(n):
        met.wait(SOON_SECONDS)
        yield n

    with Crew(3) as crew:
        assert list(crew.each(look, range(3))) == [0, 1, 2]


def test_one_thread_is_the_caller_s():
    assert set(ALONE.each(lambda _: iter([threading.get_ident()]), range(3))) == {threading.get_ident()}


def test_items_are_taken_a_few_at_a_time():
    taken = []

    def items():
        for n in range(1000):
            taken.append(n)
            yield n

    with Crew(2) as crew, closing(crew.each(lambda n: iter([n]), items())) as found:
        assert next(found) == 0
        assert len(taken) < 50


def test_several_callers_share_the_threads():
    running, most, lock = 0, 0, threading.Lock()

    def look(n):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1
        yield n

    with Crew(2) as crew, ThreadPoolExecutor(4) as callers:
        found = list(callers.map(lambda _: list(crew.each(look, range(20))), range(4)))
    assert found == [list(range(20))] * 4
    assert most == 2


def test_the_context_of_the_caller_is_that_of_its_looks(crew):
    token = VALUE.set("set")
    try:
        assert list(crew.each(lambda _: iter([VALUE.get()]), range(4))) == ["set"] * 4
    finally:
        VALUE.reset(token)


def test_every_thread_is_begun_once():
    begun, met = [], threading.Barrier(2)

    def look(n):
        met.wait(SOON_SECONDS)
        yield threading.get_ident() in begun

    with Crew(2, lambda: begun.append(threading.get_ident())) as crew:
        assert all(crew.each(look, range(8)))
    assert len(begun) == 2


def endless(n):
    while True:
        time.sleep(0.001)
        yield n


def test_a_caller_that_stops_listening_stops_its_looks_and_no_others():
    looks = []

    def look(n):
        try:
            yield n
            yield from endless(n)
        finally:
            looks.append(n)

    def fails(n):
        if n:
            yield from look(n)
        raise ValueError("the first")

    with Crew(2) as crew:
        begun = time.monotonic()
        with pytest.raises(ValueError, match="the first"):
            list(crew.each(fails, range(100)))
        assert time.monotonic() - begun < SOON_SECONDS
        assert len(looks) <= 2  # one of each thread was under way at most
        assert list(crew.each(uneven, range(3))) == [0, 0, 1, -1, 2, -2]


@pytest.mark.parametrize("n_threads", [1, 2])
def test_the_end_of_a_crew_stops_callers_in_other_threads(n_threads):
    with ThreadPoolExecutor(2) as callers:
        with Crew(n_threads) as crew:
            called = [callers.submit(list, crew.each(endless, range(100))) for _ in range(2)]
            time.sleep(0.05)
            assert not any(one.done() for one in called)
        for one in called:
            assert isinstance(one.exception(SOON_SECONDS), CancelledError)


def test_an_interrupt_of_the_caller_stops_its_looks():
    def interrupted():
        yield 0
        time.sleep(0.05)
        raise KeyboardInterrupt

    begun = time.monotonic()
    with Crew(2) as crew, pytest.raises(KeyboardInterrupt):
        list(crew.each(endless, interrupted()))
    assert time.monotonic() - begun < SOON_SECONDS

"""An interrupt is an interrupt, wherever it strikes."""

from __future__ import annotations

import threading

import pytest

from lora_merge.runtime.interrupts import whole_interrupts


@whole_interrupts()
def interrupted_in_a_condition():
    """As ``threading.Condition.wait`` is left by an interrupt that strikes while it takes its lock again."""
    lock = threading.Lock()
    with lock:
        lock.release()
        raise KeyboardInterrupt


@whole_interrupts()
def interrupted_and_tidied_up_in_vain():
    try:
        interrupted_in_a_condition()
    finally:
        raise RuntimeError("tidying up")


def test_an_interrupt_that_leaves_a_lock_open_comes_out_as_an_interrupt():
    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted_in_a_condition()

    assert str(caught.value.__cause__) == "release unlocked lock"


def test_an_interrupt_is_found_behind_another_error():
    with pytest.raises(KeyboardInterrupt):
        interrupted_and_tidied_up_in_vain()


@pytest.mark.parametrize("error", [RuntimeError("its own"), ValueError("another"), KeyboardInterrupt()])
def test_what_is_no_such_thing_comes_out_as_it_is(error):
    with pytest.raises(type(error)) as caught, whole_interrupts():
        raise error

    assert caught.value is error

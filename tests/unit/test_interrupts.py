"""An interrupt is an interrupt, wherever it strikes."""

from __future__ import annotations

import _frozen_importlib
import functools
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from lora_merge.runtime import interrupts
from lora_merge.runtime.interrupts import as_keyboard_interrupt, strike


@pytest.fixture
def handlers():
    """`strike` handles SIGINT."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGALRM)}
    signal.signal(signal.SIGINT, strike)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@as_keyboard_interrupt()
def interrupted_in_a_condition():
    """As ``threading.Condition.wait`` is left by an interrupt that strikes while it takes its lock again."""
    lock = threading.Lock()
    with lock:
        lock.release()
        raise KeyboardInterrupt


@as_keyboard_interrupt()
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
    with pytest.raises(type(error)) as caught, as_keyboard_interrupt():
        raise error

    assert caught.value is error


def interrupted_while_the_lock_of_a_module_is_dropped():
    lock = _frozen_importlib._get_module_lock("a module")
    # In C, so that the code around it is what the signal finds.
    taking = functools.partial(signal.raise_signal, signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _frozen_importlib, "_imp", SimpleNamespace(acquire_lock=taking, release_lock=lambda: None)
        )
        del lock
    time.sleep(5)


def test_an_interrupt_inside_pythons_import_code_comes_when_that_is_through(handlers, monkeypatch):
    """The code that drops the lock of a module is a callback: what is raised there is only printed."""
    monkeypatch.setattr(interrupts, "_LATER_SECONDS", 1)  # else it might come before all is put back
    swallowed = []
    monkeypatch.setattr(sys, "unraisablehook", swallowed.append)

    with pytest.raises(KeyboardInterrupt):
        interrupted_while_the_lock_of_a_module_is_dropped()

    assert not swallowed


def interrupted_in_import_code_and_behind_it():
    code = compile("strike(0, sys._getframe())", interrupts._IMPORT_CODE, "exec")
    exec(code, {"strike": strike, "sys": sys})
    signal.raise_signal(signal.SIGINT)


def test_two_interrupts_that_come_at_one_moment_are_one(handlers):
    with pytest.raises(KeyboardInterrupt):
        interrupted_in_import_code_and_behind_it()

    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)

"""Regular expressions of strangers: they compile or are named, and they end."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from lora_merge.core import patterns
from lora_merge.core.patterns import TargetError, compile_pattern, full_match, match

EXPLODING = ["(a+)+$", "(a|a)+$", "(a|a?)+$", "(.*)*!", "a?" * 40 + "a" * 40]
NAME = "a" * 39 + "b"


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(patterns, "LIMIT_SECONDS", 0.2)


@pytest.mark.parametrize("pattern", EXPLODING, ids=lambda pattern: pattern[:20])
@pytest.mark.parametrize("function", [match, full_match])
def test_a_pattern_that_explodes_is_stopped_and_named(function, pattern, hasty):
    before, start = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(TargetError, match=r"takes more than 0\.2 s to match against 'aaaa") as caught:
        function("target_modules", pattern, NAME)

    assert caught.value.field == "target_modules"
    assert time.monotonic() - start < 5
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_matches_is_what_python_matches():
    import re

    for pattern in (r".*\.q_proj", r"model\.(layers|h)\.\d+", "q_proj", r"(?i)MODEL.*", "x|y"):
        for name in ("model.layers.0.q_proj", "q_proj", "x", ""):
            assert bool(match("f", pattern, name)) == bool(re.match(pattern, name))
            assert bool(full_match("f", pattern, name)) == bool(re.fullmatch(pattern, name))


def test_an_alarm_that_the_program_has_set_is_left_alone():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert full_match("f", ".*", "name")
        time.sleep(0.2)
        assert rung == [True]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_in_another_thread_there_is_no_alarm():
    found = []
    thread = threading.Thread(target=lambda: found.append(full_match("f", r".*\.q", "model.q")))
    thread.start()
    thread.join()
    assert found[0] is not None


@pytest.mark.parametrize(
    "pattern",
    ["(", "a{2,1}", "(" * 5000 + ")" * 5000, "a{99999999999999999999}", r"\p"],
    ids=lambda text: text[:12],
)
def test_a_pattern_that_does_not_compile_is_named(pattern):
    with pytest.raises(TargetError, match="is not a regular expression"):
        compile_pattern("rank_pattern", pattern)


def test_a_pattern_of_absurd_length_is_named():
    with pytest.raises(TargetError, match="has 200001 characters, expected 200000 at most"):
        compile_pattern("rank_pattern", "a" * 200_001)

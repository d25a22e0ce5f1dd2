"""Regular expressions of strangers: they compile or are named, and they end, whoever asks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lora_merge.peft_rules import patterns
from lora_merge.peft_rules.patterns import Patterns, TargetError, patterns_of

EXPLODING = ["(a+)+$", "(a|a)+$", "(a|a?)+$", "(.*)*!", "a?" * 40 + "a" * 40]
HUGE = ["(?:a?){4000000000}", "(?:){4000000000}", "(?:|a){4000000000}"]
NAME = "a" * 39 + "b"


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(patterns, "LIMIT_SECONDS", 0.2)


@pytest.mark.parametrize("pattern", EXPLODING, ids=lambda pattern: pattern[:20])
@pytest.mark.parametrize("form", ["whole", "end"])
def test_a_pattern_that_explodes_is_stopped_and_named(form, pattern, hasty):
    start = time.monotonic()
    with pytest.raises(TargetError, match=r"takes more than 0\.2 s to match against 'aaaa") as caught:
        Patterns("target_modules", [pattern], form).matching(NAME)

    assert caught.value.field == "target_modules"
    assert repr(pattern) in str(caught.value)
    assert time.monotonic() - start < 20


def test_the_limit_is_for_all_names_together_and_ends_for_good(hasty):
    slow = slow_pattern(calibrated(0.02))
    rule, start = Patterns("target_modules", [slow], "whole"), time.monotonic()
    with pytest.raises(TargetError, match="takes more than"):
        ask_for_a_thousand(rule)
    assert time.monotonic() - start < 20

    start = time.monotonic()
    for _ in range(1000):
        with pytest.raises(TargetError, match="takes more than"):
            rule.matching("another")
    assert time.monotonic() - start < 5


def slow_pattern(n: int) -> str:
    return f"(?:(?:.?){{{n}}}!|.*)"


def ask_for_a_thousand(rule: Patterns) -> None:
    for n in range(1000):
        rule.matching(f"model.layers.{n}.self_attn.q_proj")


def calibrated(seconds: float) -> int:
    """Return how often a pattern repeats that takes a certain time for one name."""
    n = 8
    while True:
        start = time.process_time()
        re.fullmatch(slow_pattern(n), "model.layers.0.self_attn.q_proj")
        if time.process_time() - start > seconds:
            return n
        n += 1


@pytest.mark.slow
@pytest.mark.parametrize("pattern", HUGE)
def test_a_pattern_that_takes_all_memory_is_refused_elsewhere(pattern):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TargetError, match=r"needs too much memory|takes more than"):
        Patterns("target_modules", [pattern], "whole").matching(NAME)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_compiling_counts(hasty):
    slow = "(?i)" + "[\\x01-\\U0010fffe]?" * 300
    with pytest.raises(TargetError, match=r"takes more than 0\.2 s to compile"):
        Patterns("target_modules", [slow], "whole").check()


def test_thousands_of_patterns_are_stopped_together(hasty):
    many = [f"x{n}.*y" for n in range(5000)]
    with pytest.raises(TargetError, match=r"with 4999 others takes more than 0\.2 s"):
        ask_for_a_thousand(Patterns("rank_pattern", many, "end"))


@pytest.mark.slow
def test_thousands_of_names_take_no_time():
    rule = Patterns("rank_pattern", [f"model.layers.{n}.self_attn.q_proj" for n in range(20_000)], "end")
    start = time.process_time()
    found = [rule.matching(f"base.model.layers.{n}.self_attn.q_proj") for n in range(20_000)]
    assert found == [[n] for n in range(20_000)]
    assert time.process_time() - start < 15


PATTERNS = (
    r".*\.q_proj", r"model\.(layers|h)\.\d+", "q_proj", r"[mM]ODEL.*", "x|y", "", ".", "..", r"q\.proj", "^q_proj", "q_proj$",
    "^model.layers.0.q_proj$", r"\.q_proj", "0.q_proj", "x)|(y", "^", "$", "q_pro.", r"model\.layers.0\.q_proj",
)  # fmt: skip
NAMES = (
    "model.layers.0.q_proj", "q_proj", "x", "", "y", "q.proj", "modelxlayers.0.q_proj", "a.q_proj\n", "a\n.q_proj",
    "q_proj\n", "a.", "a..q_proj", ".", "0.q_proj", "q\nproj", "é.q_proj", "a.é",
)  # fmt: skip


@pytest.mark.parametrize("form", ["whole", "end"])
def test_what_matches_is_what_python_matches(form):
    def is_hit(pattern: str, name: str) -> bool:
        if form == "whole":
            return bool(re.fullmatch(pattern, name))
        return bool(re.match(rf"(.*\.)?({pattern})$", name))

    valid = [pattern for pattern in PATTERNS if form == "end" or pattern != "x)|(y"]
    rule = Patterns("f", valid, form)
    for name in NAMES:
        wanted = [at for at, pattern in enumerate(valid) if is_hit(pattern, name)]
        assert rule.matching(name) == wanted, name
        for pattern in valid:
            assert bool(Patterns("f", [pattern], form)._names.hits(name)) <= is_hit(pattern, name)


@pytest.mark.parametrize(
    "entries", [("layers",), ("h|layers", "layers"), (r"\w+", "layers"), ("lay.rs", "h"), ("^layers",)]
)
def test_the_layer_is_the_one_that_python_finds(entries):
    rule = Patterns("layers_pattern", entries, "layer")
    for name in (
        "model.layers.3.q",
        "h.4.layers.5.q",
        "layers.6.x",
        "model.h.7.attn.8.q",
        "layers.q",
        "a.layers.9",
    ):
        hits = (re.match(rf"(?:^|.*?\.){entry}\.(?P<idx>\d+)\.", name) for entry in entries)
        assert rule.layer(name) == next((hit["idx"] for hit in hits if hit), None)


def test_in_another_thread_the_limit_is_the_same(hasty):
    found: list[object] = []

    def ask() -> None:
        try:
            found.append(Patterns("f", ["(a+)+$"], "whole").matching(NAME))
        except TargetError as exc:
            found.append(exc)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(60)
    assert isinstance(found[0], TargetError)


def test_threads_may_share_patterns():
    rule = Patterns("f", [r".*\.q(\d+)"], "whole")
    found: dict[int, list[int]] = {}

    def ask(n: int) -> None:
        found[n] = [
            hit for m in range(50) for hit in rule.matching(f"model.{'q' if n % 2 else 'k'}{n * 100 + m}")
        ]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {n: [0] * 50 if n % 2 else [] for n in range(8)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is nothing to fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_process_asks_one_of_its_own():
    rule = Patterns("f", [r".*\.q_proj"], "whole")
    assert rule.matching("a.q_proj") == [0]
    child = os.fork()
    if child == 0:
        os._exit(0 if rule.matching("b.q_proj") == [0] and rule.matching("b.k_proj") == [] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert rule.matching("c.q_proj") == [0]


def test_ctrl_c_is_heard_while_a_pattern_explodes_and_leaves_no_process():
    program = (
        "from lora_merge.peft_rules import matcher; from lora_merge.peft_rules.patterns import Patterns\n"
        "rule = Patterns('f', ['(a+)+$'], 'whole'); rule.check(); print(matcher._WORKER._process.pid, flush=True)\n"
        f"rule.matching({NAME!r})"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    pid = int(running.stdout.readline())
    time.sleep(0.3)
    start = time.monotonic()
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert b"KeyboardInterrupt" in errors
    assert time.monotonic() - start < 10
    assert not alive(pid)


def test_no_process_is_left_by_one_that_is_killed():
    program = (
        "import os; from lora_merge.peft_rules import matcher; from lora_merge.peft_rules.patterns import Patterns\n"
        "rule = Patterns('f', [r'.*\\.q'], 'whole'); rule.check(); print(matcher._WORKER._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    pid, end = int(done.stdout), time.monotonic() + 20
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Return True for a process that runs; one that has ended may still have its number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    "pattern",
    ["(", "a{2,1}", "(" * 5000 + ")" * 5000, "a{99999999999999999999}", r"\p"],
    ids=lambda text: text[:12],
)
def test_a_pattern_that_does_not_compile_is_named(pattern):
    with pytest.raises(TargetError, match="is not a regular expression"):
        Patterns("rank_pattern", [pattern], "end").check()


def test_a_pattern_of_absurd_length_is_named():
    with pytest.raises(TargetError, match="has 200001 characters, expected at most 200000"):
        patterns_of("rank_pattern", ("a" * 200_001,), "end")

"""No process outlives the command, whatever ended that; and a terminal that is closed costs no work."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lora_merge.cli import exits
from lora_merge.executors import processes
from lora_merge.storage.staging import SUFFIX
from tests.faults.trial import content, session

pytestmark = pytest.mark.system

COMMAND = [sys.executable, "-m", "lora_merge"]
SECONDS = 60.0
"""Until something is taken never to happen."""


def wait_until(is_so) -> None:
    end = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def two_bases(pico, pico_adapter, tmp_path):
    """A batch of two bases, for two processes; the result counts those that are at work."""
    base = pico("llama", "float16")
    jobs = []
    for n in range(2):
        shutil.copytree(base, tmp_path / "bases" / str(n))
        jobs += [
            {"adapter": str(pico_adapter(base, r=rank)), "base": f"bases/{n}", "out": f"out/{n}-{rank}"}
            for rank in (2, 3)
        ]
    (tmp_path / "batch.yaml").write_text(yaml.safe_dump({"jobs": jobs}))
    return [*COMMAND, "batch", "batch.yaml", "--log-file", "log", "--jobs"]


def begun(command, root):
    """Start a command in a session of its own, and return it once it has begun a job."""
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True, start_new_session=True)
    log = root / "log"
    wait_until(lambda: '"running"' in (log.read_text() if log.exists() else "") or process.poll() is not None)
    return process


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_processes_of_a_batch_end_when_it_is_killed_and_what_they_had_done_is_taken_up(two_bases, tmp_path):
    with begun([*two_bases, "2"], tmp_path) as process:
        time.sleep(0.3)
        process.kill()
    try:
        wait_until(lambda: not session(process.pid))
    finally:
        for left in session(process.pid):
            os.kill(left, signal.SIGKILL)

    assert len(list(tmp_path.glob("out/*/config.json"))) < 4  # nobody went on to the end
    assert subprocess.run([*two_bases, "1", "-q"], cwd=tmp_path, check=False).returncode == exits.OK
    found = content(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert subprocess.run([*two_bases, "1", "-q"], cwd=tmp_path, check=False).returncode == exits.OK
    assert content(tmp_path / "out") == found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("whom", "signum"),
    [
        ("the command", signal.SIGHUP),
        ("all of the terminal", signal.SIGHUP),
        ("all of the terminal", signal.SIGTERM),
    ],
)
def test_a_batch_whose_terminal_is_closed_ends_with_its_processes_and_a_report(
    whom, signum, two_bases, tmp_path
):
    with begun([*two_bases, "2"], tmp_path) as process:
        (os.kill if whom == "the command" else os.killpg)(process.pid, signum)
        _, said = process.communicate(timeout=SECONDS)

    assert process.returncode == exits.INTERRUPTED, said
    assert "Traceback" not in said
    assert "error: interrupted; finished jobs are kept" in said
    wait_until(lambda: not session(process.pid))


def test_a_merge_whose_terminal_is_closed_keeps_what_is_whole(pico, pico_adapter, tmp_path):
    base = pico("llama", "bfloat16", "30KB")
    command = [*COMMAND, "--base", base, "--adapter", pico_adapter(base), "--out", "out", "--resume"]
    journal = tmp_path / f"out{SUFFIX}" / "journal.jsonl"
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: journal.exists() and journal.read_text().count("\n") > 1)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGHUP)  # the terminal says so, and its shell
        _, said = process.communicate(timeout=SECONDS)

    assert process.returncode == exits.INTERRUPTED, said
    assert "error: interrupted" in said
    assert "run again with --resume" in said
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == exits.OK, done.stderr
    assert "had already written" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("whom", "signum"),
    [
        ("all of the terminal", signal.SIGINT),
        ("all of the terminal", signal.SIGTERM),
        ("the command", signal.SIGINT),
        ("the command", signal.SIGKILL),
    ],
)
def test_a_merge_by_processes_that_is_ended_keeps_what_is_whole_and_leaves_no_process(
    whom, signum, pico, pico_adapter, tmp_path
):
    base = pico("llama", "bfloat16", "30KB")
    common = ["--base", base, "--adapter", pico_adapter(base), "--resume", "--workers", "2"]
    command = [*COMMAND, *common, "--out", "out", "--executor", "processes"]
    journal = tmp_path / f"out{SUFFIX}" / "journal.jsonl"
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_until(
            lambda: process.poll() is not None or (journal.exists() and journal.read_text().count("\n") > 1)
        )
        (os.kill if whom == "the command" else os.killpg)(process.pid, signum)
        _, said = process.communicate(timeout=SECONDS)
    wait_until(lambda: not session(process.pid))

    assert "Traceback" not in said
    if signum != signal.SIGKILL:
        assert process.returncode == exits.INTERRUPTED, said
        assert "error: interrupted" in said
        assert "run again with --resume" in said
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == exits.OK, done.stderr
    assert "had already written" in done.stderr
    other = [*COMMAND, *common, "--out", "other/out", "--executor", "serial"]
    subprocess.run(other, cwd=tmp_path, check=True, capture_output=True)
    assert content(tmp_path / "out") == content(tmp_path / "other" / "out")


def test_a_merge_that_was_started_to_outlive_its_terminal_does(pico, pico_adapter, tmp_path):
    base = pico("llama", "bfloat16")
    command = ["nohup", *COMMAND, "--base", base, "--adapter", pico_adapter(base), "--out", "out"]
    staged = tmp_path / f"out{SUFFIX}"
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: staged.exists() or process.poll() is not None)
        process.send_signal(signal.SIGHUP)
        _, said = process.communicate(timeout=SECONDS)

    assert process.returncode == exits.OK, said
    assert (tmp_path / "out" / "config.json").exists()


# ---------------------------------------------------------------------------- the crew itself


def doubled(n):
    if n == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if n == 4:
        raise ValueError("four")
    if n == 5:
        return lambda: None  # does not travel
    return 2 * n


def test_a_piece_of_work_that_ends_its_process_fails_alone_and_its_place_is_taken(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    waiting, found = list(range(1, 9)), {}
    with processes.Crew(doubled, 2) as crew:
        while waiting or not crew.is_idle:
            while waiting and crew.has_room:
                crew.begin(waiting.pop(0))
            found |= dict(crew.results())

    assert {n: found[n] for n in (1, 2, 6, 7, 8)} == {1: 2, 2: 4, 6: 12, 7: 14, 8: 16}
    assert found[3] == processes.Broken("", "SIGKILL")
    assert (found[4].kind, found[4].text) == ("ValueError", "four")
    assert "pickle" in found[5].text


def lone(pipe, lifeline):
    """Stand for a process whose system cannot tell it that its parent has ended."""
    processes.sys.platform = "other"
    processes._serve(time.sleep, pipe, lifeline, os.getppid())


def test_a_process_ends_with_its_parent_where_only_a_pipe_tells_it(monkeypatch):
    from multiprocessing import get_context

    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    context = get_context("spawn")
    (ours, its), (reading, writing) = context.Pipe(), context.Pipe(duplex=False)
    process = context.Process(target=lone, args=(its, reading))
    process.start()
    ours.send(SECONDS)  # it is at work
    assert process.is_alive()

    writing.close()
    process.join(SECONDS / 2)
    found = process.exitcode
    process.kill()

    assert found == -signal.SIGKILL

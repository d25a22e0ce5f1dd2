"""Ctrl-C before the command has begun: while its modules are imported."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lora_merge
from lora_merge.cli import exits

ROOT = Path(lora_merge.__file__).parents[1]

SLEEPS = """
import os, sys, time

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == when:
            os.write(1, b"here")
            time.sleep(60)

when = sys.argv.pop(1)
sys.meta_path.insert(0, Finder())
"""
"""Sleeps where a module is about to be imported."""

ENTRY = "from lora_merge.cli import entry; entry()"
HF_ENTRY = "from lora_merge.cli import hf_entry; hf_entry()"

AT_START = (
    "lora_merge.cli.process",
    "click",
    "lora_merge.cli.merge",
    "lora_merge.runtime.streams",
    "lora_merge.runtime.temporary",
)


def started(when: str, *arguments: str, program: str = ENTRY) -> tuple[int, int]:
    """Start the command in a new terminal; return the process, which sleeps, and the terminal."""
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", SLEEPS + program, when, *arguments])
    said = b""
    while b"here" not in said:
        said += os.read(terminal, 4096)
    return pid, terminal


def ended(pid: int, terminal: int) -> tuple[int, str]:
    """Return the exit status of a process, and what it has printed since."""
    said = b""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and select.select([terminal], [], [], 30)[0]:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # Linux's way to say that the other side is closed
            part = b""
        if not part:
            break
        said += part
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), said.decode()


@pytest.mark.parametrize("when", AT_START)
@pytest.mark.parametrize("program", [ENTRY, HF_ENTRY])
def test_an_interrupt_while_modules_are_imported_ends_as_a_later_one_does(when, program):
    pid, terminal = started(when, "--base", "b", "--adapter", "a", "--out", "o", program=program)
    os.write(terminal, b"\x03")  # Ctrl-C, which the terminal turns into SIGINT for the group
    status, said = ended(pid, terminal)

    assert status == exits.INTERRUPTED
    assert said.removeprefix("^C").splitlines() == [
        "error: interrupted; no output was created",
        "hint: run the same command again to start over",
    ]


def test_a_command_that_only_shows_something_does_not_speak_of_an_output():
    pid, terminal = started("click", "verify", "merged")
    os.write(terminal, b"\x03")
    status, said = ended(pid, terminal)

    assert status == exits.INTERRUPTED
    assert said.removeprefix("^C").splitlines()[0] == "error: interrupted"


def test_nothing_can_be_said_on_a_closed_stream():
    run = subprocess.Popen(
        ["/bin/sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, "-c", SLEEPS + ENTRY, "click", "--help"],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert run.stdout is not None
    assert run.stdout.read(4) == b"here"
    run.send_signal(signal.SIGINT)
    assert run.wait(30) == exits.INTERRUPTED
    assert run.stdout.read() == b""


def test_before_an_interrupt_can_be_answered_next_to_nothing_is_imported():
    program = (
        "import os, sys; before = set(sys.modules); import lora_merge.cli; print(*set(sys.modules) - before)\n"
        "print(*{'typing', 'signal', 'enum'} & set(sys.modules))"
    )
    # Without site, which may import anything.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-S", "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    own, heavy = run.stdout.split("\n")[:2]
    assert set(own.split()) <= {"__future__", "lora_merge", "lora_merge._version", "lora_merge.cli"}
    assert heavy == ""

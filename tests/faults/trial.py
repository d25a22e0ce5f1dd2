"""One command that is ended, or fails, and is then run again: what it left each time, and what came of it in the end."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_write = os.write
"""The kernel's own, which no strike is counted in: a run that was struck while it answers would leave half an answer."""

SECONDS = 120
"""Until a run is taken for one that hangs."""


@dataclass(frozen=True)
class Job:
    """A command, whose outputs are folders of one directory."""

    arguments: list[str]
    """Without ``--resume``; ``{work}`` stands for the directory."""

    outs: list[str]
    """Names of the outputs."""

    old: str | None = None
    """A directory that stands under each output's name before; None for nothing."""

    again: list[str] = field(default_factory=list)
    """What is added to go on from where a run stopped."""

    twice: float = 0.3
    """How often the second run is ended, too."""

    n_last: int = 0
    """It is ended at one of that many calls at the end of a run; 0 for all calls."""

    in_two_steps: bool = False
    """As where the kernel cannot exchange two names: there is a moment without an output then."""

    has_processes: bool = False
    """It works in processes of its own, whose calls cannot be counted: it is ended after some time."""


@dataclass(frozen=True)
class Ended:
    """How one run ended."""

    code: int
    """As a shell has it: 128 and the number of a signal."""

    text: str
    calls: int
    seconds: float


def run(
    arguments: list[str], prepare: Callable[[], Callable[[], int]] = lambda: lambda: 0, kill_after: float = 0
) -> Ended:
    """Run the command in a fork, in a session of its own.

    Args:
        arguments: of the command.
        prepare: called in the fork before; it returns what counts the calls.
        kill_after: seconds until it is killed; 0 for never.
    """
    reading, writing = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if not child:
        os.close(reading)
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it
        signal.alarm(SECONDS)
        calls = prepare()
        code, out, err = in_process(arguments)
        answer = json.dumps({"text": out + err, "calls": calls()}).encode()
        while answer:
            answer = answer[_write(writing, answer) :]
        os._exit(code)
    os.close(writing)
    if kill_after:
        timer = threading.Timer(kill_after, os.kill, (child, signal.SIGKILL))
        timer.start()
    with os.fdopen(reading, "rb") as answers:
        answer = answers.read()
    if kill_after:
        timer.cancel()
        timer.join()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said: dict[str, Any] = json.loads(answer) if answer else {"text": "", "calls": 0}
    code = status if status >= 0 else 128 - status
    seconds = time.monotonic() - began
    if not none_left(child):
        return Ended(code, f"processes are left: {session(child)}", -1, seconds)
    return Ended(code, said["text"], said["calls"], seconds)


def none_left(leader: int) -> bool:
    """Return True once no process of a session is left; False where some do not end."""
    end = time.monotonic() + SECONDS / 4
    while session(leader):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def session(leader: int) -> list[int]:
    """Return the processes that live in the session that another one led."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its = path.read_text().rpartition(")")[2].split()[:4]
            if int(its) == leader and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def in_process(arguments: list[str]) -> tuple[int, str, str]:
    """Run the command here; return its exit code and what it printed."""
    from lora_merge.cli import main

    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments, prog_name="lora-merge")
        except SystemExit as exc:
            code = exc.code
        except BaseException as exc:  # noqa: BLE001 - a bug, which the test is to see
            code = 1
            err.write(repr(exc))
    return int(code or 0), out.getvalue(), err.getvalue()


def content(root: Path) -> dict[str, str]:
    """Return a digest of every file below a directory."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


class Trial:
    """A job that is tried again and again.

    Args:
        job: what is tried.
        work: an empty directory.
    """

    def __init__(self, job: Job, work: Path) -> None:
        self.job, self.work = job, work
        self.arguments = [text.replace("{work}", str(work)) for text in job.arguments]
        self._old = content(Path(job.old)) if job.old else None
        in_process(self.arguments)  # imports everything that the forks need
        self.clear()
        whole = run(self.arguments)
        if whole.code:
            raise SystemExit(f"the job itself fails: {whole.text}")
        self.seconds = whole.seconds
        self.whole = {name: content(work / name) for name in job.outs}
        files = [path for name in job.outs for path in (work / name).rglob("*") if path.is_file()]
        self.sizes = [path.stat().st_size for path in files]
        self.clear()

    def clear(self) -> None:
        """Begin anew: the old outputs stand, or nothing."""
        for path in list(self.work.iterdir()):
            if path.is_dir():
                shutil.rmtree(path)
        for name in self.job.outs if self.job.old else ():
            shutil.copytree(str(self.job.old), self.work / name)

    def is_new(self) -> bool:
        """Return True when every output is there, and whole."""
        return all(self._now(name) == whole for name, whole in self.whole.items())

    def _now(self, name: str) -> dict[str, str] | None:
        path = self.work / name
        return content(path) if path.is_dir() else None

    def left(self) -> Iterator[str]:
        """Yield a word for each output that is neither as it was before, nor whole."""
        for name, whole in self.whole.items():
            now = self._now(name)
            if now not in (self._old, whole) and not (now is None and self.job.in_two_steps):
                yield f"broken: {name} is {now}"

    def again(self) -> Iterator[str]:
        """Run it once more, with nothing in its way, and yield what came of it."""
        done = run([*self.arguments, *self.job.again])
        others = [path.name for path in self.work.iterdir() if path.is_dir() and path.name not in self.whole]
        if done.code or not self.is_new():
            yield f"broken: the last run ended with {done.code}: {done.text}"
        elif others:
            yield f"broken: {others} are left"
        elif done.calls < 0:
            yield f"broken: {done.text}"
        else:
            yield "resumed"
        if "had already written" in done.text:
            yield "from where it stopped"

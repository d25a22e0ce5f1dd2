"""End runs at calls to the kernel drawn at random, run them again, and compare: ``killing JOB`` prints what it found.

It is a process of its own, with torch loaded once: each run is a fork of it. In a fork the calls are counted, and at
the one that was drawn the process gets its signal, with half of what it was to write written. A job that works in
processes is ended after a time drawn at random.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.faults.trial import Ended, Job, Trial, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CALLS = (
    "open", "write", "pwritev", "posix_fallocate", "fsync", "rename", "replace", "mkdir", "unlink",
    "rmdir", "link", "fchmod",
)  # fmt: skip
KILLED, INTERRUPTED = 137, 130


def strike(at: int | None, signum: int) -> Callable[[], int]:
    """Have the process get a signal at one of its calls; the result says how many there were."""
    count = itertools.count()
    lock = threading.Lock()

    def wrap(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            with lock:
                n = next(count)
            if n == at:
                with contextlib.suppress(OSError):
                    _half(name, call, arguments)
                os.kill(os.getpid(), signum)
            return call(*arguments, **named)

        return counted

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name), name))
    return lambda: next(count)


def _half(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Do the first half of a write."""
    match name, arguments:
        case "write", (fd, data):
            call(fd, bytes(data)[: len(data) // 2])
        case "pwritev", (fd, buffers, offset, *flags):
            call(fd, [bytes(buffers[0])[: len(buffers[0]) // 2]], offset, *flags)


class Killing:
    """Many ends of one job.

    Args:
        trial: the job.
        draw: what is drawn from.
        signum: what ends it.
    """

    def __init__(self, trial: Trial, draw: random.Random, signum: int) -> None:
        self._trial, self._draw, self._signum = trial, draw, signum
        self._n_calls = 0
        if not trial.job.has_processes:
            self._n_calls = run(trial.arguments, lambda: strike(None, signum)).calls
            trial.clear()

    def once(self) -> Iterator[str]:
        """End one run and go on from there, perhaps ending that too at first; yield a word for each thing that happened."""
        trial = self._trial
        yield from self._look(self._ended(trial.arguments))
        if trial.is_new():
            trial.clear()
        if self._draw.random() < trial.job.twice:
            yield from self._look(self._ended([*trial.arguments, *trial.job.again]))
        if trial.is_new():
            trial.clear()
        yield from trial.again()
        trial.clear()

    def _ended(self, arguments: list[str]) -> Ended:
        if self._trial.job.has_processes:
            return run(arguments, kill_after=self._draw.uniform(0.01, self._trial.seconds))
        n_last = self._trial.job.n_last
        at = self._draw.randrange(max(self._n_calls - n_last, 0) if n_last else 0, self._n_calls)
        return run(arguments, lambda: strike(at, self._signum))

    def _look(self, ended: Ended) -> Iterator[str]:
        """Yield what an ended run left: the output as it was before, or whole."""
        wanted = KILLED if self._signum == signal.SIGKILL else INTERRUPTED
        if ended.calls < 0:
            yield f"broken: {ended.text}"
        if ended.code == wanted:
            yield "ended"
            if self._signum != signal.SIGKILL and "error: interrupted; " not in ended.text:
                yield f"broken: an interrupt says {ended.text!r}"
        elif ended.code:
            yield f"broken: it ended with {ended.code}: {ended.text}"
        yield from self._trial.left()


def main() -> None:
    """Carry out ``{"job": {…}, "work": DIR, "n": N, "seed": N, "signal": N}``."""
    told = json.loads(sys.argv[1])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    from lora_merge.storage import publish

    torch.set_num_threads(1)
    job = Job(**told["job"])
    if job.in_two_steps:
        publish.renamed = lambda one, other, flag: False
    killing = Killing(Trial(job, Path(told["work"])), random.Random(told["seed"]), told["signal"])
    words = [word for _ in range(told["n"]) for word in killing.once()]
    sys.stdout.write(json.dumps({word: words.count(word) for word in sorted(set(words))}))


if __name__ == "__main__":
    main()

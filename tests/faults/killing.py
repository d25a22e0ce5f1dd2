"""End merges at calls to the kernel drawn at random, resume them, and compare: ``killing.py JOB`` prints what it found.

It is a process of its own, with torch loaded once: each run is a fork of it. In a fork the calls are counted, and at
the one that was drawn the process gets its signal, with half of what it was to write written.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CALLS = (
    "open", "write", "pwritev", "copy_file_range", "posix_fallocate", "fsync", "rename", "replace", "mkdir", "unlink",
    "rmdir", "link", "fchmod",
)  # fmt: skip
KILLED, INTERRUPTED = 137, 130
SECONDS = 60
"""Until a run is taken for one that hangs."""


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
        case "copy_file_range", (source, target, nbytes, *offsets):
            call(source, target, nbytes // 2, *offsets)


def run(arguments: list[str], at: int | None = None, signum: int = signal.SIGKILL) -> tuple[int, str, int]:
    """Run the command in a fork; return its exit code, what it printed, and how many calls it made."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        signal.alarm(SECONDS)
        calls = strike(at, signum)
        code, out, err = _main(arguments)
        answer = json.dumps({"text": out + err, "calls": calls()}).encode()
        while answer:
            answer = answer[os.write(writing, answer) :]
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as answers:
        answer = answers.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = json.loads(answer) if answer else {"text": "", "calls": 0}
    return status if status >= 0 else 128 - status, said["text"], said["calls"]


def _main(arguments: list[str]) -> tuple[int, str, str]:
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
    """Many ends of one merge.

    Args:
        arguments: of the command, without ``--out``.
        work: an empty directory.
        old: what stands under the output's name before; None for nothing.
        n_last: draw from that many calls at the end of a run; 0 for all.
        in_two_steps: as where the kernel cannot exchange two names: there is a moment without an output then.
    """

    def __init__(
        self,
        arguments: list[str],
        work: Path,
        old: Path | None,
        n_last: int = 0,
        *,
        in_two_steps: bool = False,
    ) -> None:
        self._n_last, self._in_two_steps = n_last, in_two_steps
        self._work, self._out = work, work / "out"
        self._arguments = [*arguments, "--out", str(self._out), *(["--overwrite"] if old else [])]
        self._old = content(old) if old else None
        self._old_root = old
        self._set_up()
        code, said, self.n_calls = run([*self._arguments, "--json"])
        if code:
            raise SystemExit(f"the merge itself fails: {said}")
        self._whole = content(self._out)
        self._set_up()

    def _set_up(self) -> None:
        shutil.rmtree(self._out, ignore_errors=True)
        if self._old_root:
            shutil.copytree(self._old_root, self._out)

    def once(self, draw: random.Random, signum: int) -> Iterator[str]:
        """End one run and resume it, perhaps ending that too at first; yield a word for each thing that happened."""
        code, said, _ = run(self._arguments, self._drawn(draw), signum)
        yield from self._look(code, said, signum)
        if self._is_new():
            self._set_up()
        if draw.random() < 0.3:
            code, said, _ = run([*self._arguments, "--resume"], self._drawn(draw), signum)
            yield from self._look(code, said, signum)
        if self._is_new():
            self._set_up()
        code, said, _ = run([*self._arguments, "--resume"])
        if code or content(self._out) != self._whole:
            yield f"broken: resuming ended with {code}: {said}"
        elif left := [path.name for path in self._work.iterdir() if path != self._out]:
            yield f"broken: {left} are left"
        else:
            yield "resumed"
        if "were there from an interrupted run" in said:
            yield "from where it stopped"
        self._set_up()

    def _drawn(self, draw: random.Random) -> int:
        return draw.randrange(max(self.n_calls - self._n_last, 0) if self._n_last else 0, self.n_calls)

    def _is_new(self) -> bool:
        return self._out.is_dir() and content(self._out) == self._whole

    def _look(self, code: int, said: str, signum: int) -> Iterator[str]:
        """Yield what an ended run left: the output as it was before, or whole."""
        wanted = KILLED if signum == signal.SIGKILL else INTERRUPTED
        if code == wanted:
            yield "ended"
            if signum != signal.SIGKILL and "error: interrupted; nothing unfinished" not in said:
                yield f"broken: an interrupt says {said!r}"
        elif code:
            yield f"broken: it ended with {code}: {said}"
        now = content(self._out) if self._out.exists() else None
        if now not in (self._old, self._whole) and not (now is None and self._in_two_steps):
            yield f"broken: the output is {now}"


def main() -> None:
    """Carry out a job: ``{"arguments": […], "work": DIR, "old": DIR|null, "n": N, "seed": N, "signal": N}``."""
    job = json.loads(sys.argv[1])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    from lora_merge.io import publish

    torch.set_num_threads(1)
    warm = Path(job["work"]) / "warm"
    _main([*job["arguments"], "--out", str(warm)])  # imports everything that the forks need
    shutil.rmtree(warm)
    in_two_steps = job.get("in_two_steps", False)
    if in_two_steps:
        publish.renamed = lambda one, other, flag: False
    old = Path(job["old"]) if job["old"] else None
    trial = Trial(job["arguments"], Path(job["work"]), old, job.get("n_last", 0), in_two_steps=in_two_steps)
    draw = random.Random(job["seed"])
    words = [word for _ in range(job["n"]) for word in trial.once(draw, job["signal"])]
    sys.stdout.write(json.dumps({word: words.count(word) for word in sorted(set(words))}))


if __name__ == "__main__":
    main()

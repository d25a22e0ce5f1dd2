"""A process that matches untrusted regular expressions.

A few characters can keep Python's matcher busy practically for ever (``(a+)+$``), or have it take all memory
(``(?:a?){4000000000}``), or its compiler (``(?i)`` and a class over all of Unicode). In this process only an alarm could stop it,
only in the main thread, and nothing could limit its memory. Another process has limits that the kernel keeps.
A program has one such process. It takes some fifty milliseconds to start, and fifty microseconds for a name.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

_SCRIPT = Path(__file__).with_name("matcher_script.py")
_NUMBERS = itertools.count(1)


class MatcherError(Exception):
    """An expression cannot be used, or not within the limits."""

    def __init__(self, at: int, sentence: str) -> None:
        super().__init__(sentence)
        self.at = at
        """Which of the expressions."""


class Matcher:
    """Matches names against expressions, all of them within one limit of time. Threads may share it.

    Args:
        expressions: as Python spells them.
        how: as the methods of a compiled expression are called.
        seconds: of the processor's time, for compiling all of them and for all names together.
    """

    def __init__(
        self, expressions: Sequence[str], how: Literal["match", "fullmatch"], seconds: float
    ) -> None:
        self._expressions, self._how = list(expressions), how
        self._seconds = self._left = seconds
        self._number = next(_NUMBERS)
        self._problem: MatcherError | None = None

    def find(self, names: Sequence[str]) -> list[list[tuple[int, str | None]]]:
        """Return for each name the places of the expressions that match it, with the group ``idx`` of each.

        Raises:
            MatcherError: one does not compile, time or memory ran out, or no process can be started; so it does at each
                further call.
        """
        # A matcher that failed once fails at once from then on: its limit of time is for all names together.
        if self._problem is None:
            answer = self._answer(list(names))
            if "found" in answer:
                self._left = answer["left"]
                return [[(at, index) for at, index in hits] for hits in answer["found"]]
            self._problem = self._problem_of(answer)
        raise self._problem

    def _answer(self, names: list[str]) -> dict[str, Any]:
        question = {"job": self._number, "how": self._how, "left": self._left, "names": names}
        answer = _WORKER.ask(question)
        # The process keeps compiled expressions by their number. A new one, or one that dropped them, has to be told.
        if "unknown" in answer:
            answer = _WORKER.ask({**question, "expressions": self._expressions})
        return answer

    def _problem_of(self, answer: dict[str, Any]) -> MatcherError:
        if "wrong" in answer:
            return MatcherError(answer["wrong"], f"is not a regular expression: {answer['why']}")
        if "late" in answer:
            name = answer["name"]
            what = f"match against {name[:200]!r}" if name else "compile"
            return MatcherError(answer["late"], f"takes more than {self._seconds:g} s to {what}")
        if "none" in answer:
            sentence = f"must be matched in a separate process, and none can be started ({answer['none']})"
            return MatcherError(0, sentence)
        return MatcherError(answer["memory"], "needs too much memory to compile or to match")


class _Worker:
    """The process, which is started when it is needed and again after it was ended. It ends with the program."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a question: ``memory`` where the process ended over it, ``none`` where none can be
        started.
        """
        with self._lock:
            try:
                process = self._running()
            except OSError as exc:
                return {"none": exc.strerror}
            try:
                answer = _exchange(process, question)
            except BaseException:  # an interrupt, too: an unread answer would be taken for the next one
                self._stop()
                raise
            if answer is None or "memory" in answer:
                self._stop()
            return answer or {"memory": 0}

    def _running(self) -> subprocess.Popen[bytes]:
        """Return the process, and start it where there is none.

        Raises:
            OSError: none can be started.
        """
        if self._process is None or self._owner != os.getpid():  # a fork has the pipes of who started it
            self._process = subprocess.Popen(  # noqa: S603 - this Python, and a script of this package
                # Isolated and without site-packages: the script needs the standard library alone.
                [sys.executable, "-I", "-S", str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._owner = os.getpid()
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        process.wait()

    def stop(self) -> None:
        """End the process; the next question starts another."""
        with self._lock:
            self._stop()


def _exchange(process: subprocess.Popen[bytes], question: dict[str, Any]) -> dict[str, Any] | None:
    """Return the answer of a process to a question; None where the process ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    # A process that dies while it answers leaves no line, or one without an end.
    line = process.stdout.readline()
    answer: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
    return answer


_WORKER = _Worker()
atexit.register(_WORKER.stop)

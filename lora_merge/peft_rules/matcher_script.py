"""What the process of `lora_merge.peft_rules.matcher` runs: Python's standard library alone, and nothing of this package.

It reads questions, one line of JSON each, and answers each with another. A question has expressions under a number, unless
this process knows them by it, and names; the answer says what matches. Time is counted in seconds of the processor, from the
first compilation to the last name. The kernel ends the process should Python not be able to.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from typing import Any

MEMORY_BYTES = 1 << 29
"""Address space that the process may have: 512 MiB."""

MOST_JOBS = 32
"""Lists of compiled expressions that it keeps."""


class _TimeUpError(Exception):
    pass


class _Work:
    """Compiles and matches, and knows which expression and which name it is at when time runs out.

    Args:
        left: seconds of the processor that it may take.
    """

    def __init__(self, left: float) -> None:
        self.left = left
        self._at, self._name, self._is_on = 0, "", False
        signal.signal(signal.SIGPROF, self._time_up)

    def answer(self, question: dict[str, Any], jobs: dict[int, list[re.Pattern[str]]]) -> dict[str, Any]:
        began = time.process_time()
        try:
            try:
                self._is_on = True
                # 0 would switch the timer off.
                signal.setitimer(signal.ITIMER_PROF, max(self.left, 0.001))
                if "expressions" in question:
                    jobs[question["job"]] = self._compiled(question["expressions"])
                found = self._found(jobs[question["job"]], question["how"], question["names"])
            finally:
                self._is_on = False
                signal.setitimer(signal.ITIMER_PROF, 0)
        except _TimeUpError:
            return {"late": self._at, "name": self._name}
        except MemoryError:
            return {"memory": self._at}
        except (re.error, RecursionError, OverflowError) as exc:
            return {"wrong": self._at, "why": str(exc)}
        self.left -= (
            time.process_time() - began
        )  # the timer itself counts in ticks, and misses what is shorter
        if self.left <= 0:
            return {"late": self._at, "name": self._name}
        return {"found": found, "left": self.left}

    def _time_up(self, *_: object) -> None:
        # A signal that was under way when the timer was stopped would otherwise strike outside of the try.
        if self._is_on:
            raise _TimeUpError

    def _compiled(self, expressions: list[str]) -> list[re.Pattern[str]]:
        compiled = []
        for self._at, expression in enumerate(expressions):
            compiled.append(re.compile(expression))
        return compiled

    def _found(self, compiled: list[re.Pattern[str]], how: str, names: list[str]) -> list[list[Any]]:
        """Return for each name the places of the expressions that match it, with the group ``idx`` of each."""
        matching: Any = re.Pattern.fullmatch if how == "fullmatch" else re.Pattern.match
        found = []
        for self._name in names:
            hits = []
            for self._at, pattern in enumerate(compiled):
                hit = matching(pattern, self._name)
                if hit:
                    hits.append([self._at, hit.groupdict().get("idx")])
            found.append(hits)
        return found


def main() -> None:
    """Answer questions until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks decides when this ends
    jobs: dict[int, list[re.Pattern[str]]] = {}
    for line in iter(sys.stdin.buffer.readline, b""):
        question = json.loads(line)
        answer: dict[str, Any] = {"unknown": True}
        if question["job"] in jobs or "expressions" in question:
            _limit(question["left"])
            answer = _Work(question["left"]).answer(question, jobs)
        while len(jobs) > MOST_JOBS:
            # The oldest; whoever asks for it again sends the expressions once more.
            jobs.pop(next(iter(jobs)))
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()
        if "memory" in answer:
            # The parent starts another, with all of its memory free.
            os._exit(0)


def _limit(left: float) -> None:
    """Have the kernel end this process where it takes more memory or processor time than it may."""
    try:
        import resource
    except ImportError:  # no Unix
        return
    for kind, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        # Ten seconds beyond the timer, which is enough unless the matcher never lets Python handle the signal.
        (resource.RLIMIT_CPU, int(time.process_time() + left) + 10),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()

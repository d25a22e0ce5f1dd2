"""How a program in the engines' environment is spoken to: a document of jobs on stdin, a line for each on stdout."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

Job = dict[str, Any]
Line = dict[str, Any]


def answer_all(answer: Callable[[Job, str], Line]) -> None:
    """Answer the jobs on stdin, each with a line: what the function returns for it, or its error."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print on stdout
    document = json.load(sys.stdin)
    for job in document["jobs"]:
        started = time.monotonic()
        try:
            said = answer(job, document["dtype"])
        except Exception as error:  # noqa: BLE001 - whatever it is, the next job gets its turn
            said = {"error": f"{type(error).__name__}: {error}"}
        seconds = round(time.monotonic() - started, 2)
        lines.write(f"{json.dumps({'checkpoint': job['checkpoint'], 'seconds': seconds, **said})}\n")
        lines.flush()

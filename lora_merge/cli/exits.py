"""Exit codes: the one table from error to code."""

from __future__ import annotations

from lora_merge.cli import INTERRUPTED as _INTERRUPTED
from lora_merge.errors import (
    LoraMergeError,
    PlanError,
    RequestError,
    ResolveError,
    VerifyError,
    WriteError,
)

OK = 0
BUG = 1
USAGE = 2
RESOLVE = 3
PLAN = 4
WRITE = 5
VERIFY = 6
BATCH = 7
INTERRUPTED = _INTERRUPTED

# Printed by ``--help``.
MEANINGS: dict[int, str] = {
    OK: "done",
    BUG: "a bug in lora-merge; the traceback is printed",
    USAGE: "the command line or a request file is wrong",
    RESOLVE: "a base or adapter cannot be found or read",
    PLAN: "adapter and base do not fit, or cannot be merged",
    WRITE: "the output cannot be written: it exists, the disk is full, …",
    VERIFY: "verification failed; a merge that fails it creates no output",
    BATCH: "some jobs of a batch failed; the report lists them",
    INTERRUPTED: "interrupted (Ctrl-C, SIGTERM, or a closed terminal)",
}

_CODES: tuple[tuple[type[LoraMergeError], int], ...] = (
    (RequestError, USAGE),
    (ResolveError, RESOLVE),
    (PlanError, PLAN),
    (WriteError, WRITE),
    (VerifyError, VERIFY),
)


def code_of(error: LoraMergeError) -> int:
    """Return the exit code of an error. A class that the table lacks counts as a bug."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), BUG)

"""The command line: one file per command; options, exit codes and the console are shared."""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from lora_merge.cli.app import main
from lora_merge.redaction import without_secrets

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["entry", "main"]


def entry() -> NoReturn:
    """Run the command as a process of its own, and end the process at once when it is done.

    Taking an interpreter down after torch was loaded costs half a second, and collecting garbage while it
    loads a fifth; a process that is about to end needs neither.
    """
    gc.disable()
    sys.excepthook = _say_bug
    code = 0
    try:
        main(prog_name="lora-merge")
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of a bug, which may quote anything, without secrets."""
    import traceback

    sys.stderr.write(without_secrets("".join(traceback.format_exception(kind, error, trace))))

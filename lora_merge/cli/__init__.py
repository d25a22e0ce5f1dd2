"""The command line: one file per command; options, exit codes and the console are shared."""

from __future__ import annotations

import gc
import os
import sys
from typing import NoReturn

from lora_merge.cli.app import main

__all__ = ["entry", "main"]


def entry() -> NoReturn:
    """Run the command as a process of its own, and end the process at once when it is done.

    Taking an interpreter down after torch was loaded costs half a second, and collecting garbage while it
    loads a fifth; a process that is about to end needs neither.
    """
    gc.disable()
    code = 0
    try:
        main(prog_name="lora-merge")
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

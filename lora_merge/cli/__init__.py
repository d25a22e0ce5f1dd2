"""The command line: one file per command; options, exit codes and the console are shared."""

from __future__ import annotations

import gc
import os
from typing import NoReturn

from lora_merge.cli import exits
from lora_merge.cli.app import main
from lora_merge.cli.issues import say_bug
from lora_merge.runtime.shortage import mind_limits
from lora_merge.runtime.streams import finish, guard

__all__ = ["entry", "main"]


def entry() -> NoReturn:
    """Run the command as a process of its own, and end the process at once when it is done.

    Taking an interpreter down after torch was loaded costs half a second, and collecting garbage while it
    loads a fifth; a process that is about to end needs neither.
    """
    guard()  # first of all: before any file is opened that could get a standard stream's number
    gc.disable()
    mind_limits()
    code = 0
    try:
        main(prog_name="lora-merge")
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except BaseException as exc:  # noqa: BLE001 - the process ends here, whatever it is
        code = exits.BUG
        say_bug(exc)
    finish()
    os._exit(code)
